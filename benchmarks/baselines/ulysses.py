"""DeepSpeed-Ulysses (arXiv 2309.14509): trade tokens for heads, attend to whole sequences, trade back.

B sequences, n tokens on each of W ranks, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Swap(torch.autograd.Function):
    """Slices along `cut` go to the ranks, what comes is joined along `join`; its gradient is the opposite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, join: int, group: Any) -> Tensor:
        ctx.cut, ctx.join, ctx.group = cut, join, group
        size = dist.get_world_size(group)
        outgoing = torch.stack(x.chunk(size, cut))
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=group)
        return torch.cat(incoming.unbind(0), join)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Any, ...]:
        return _Swap.apply(d_x, ctx.join, ctx.cut, ctx.group), None, None, None


def ulysses(attention: Attention, q: Tensor, k: Tensor, v: Tensor, group: Any) -> Tensor:
    """Attention over a sequence whose tokens lie on the ranks of `group`, consecutively.

    Args:
        attention: of q, k [B, W n, h, K] and v [B, W n, h, V] to o [B, W n, h, V], softmax or linear, on one device.
        q: [B, n, H, K]; k: [B, n, G, K]; v: [B, n, G, V]; W divides H and G.

    Returns:
        o [B, n, H, V].
    """
    size = dist.get_world_size(group)
    if q.shape[2] % size or k.shape[2] % size:
        raise ValueError(f"heads must be a multiple of the {size} ranks, got {q.shape[2]} and {k.shape[2]}")
    q, k, v = (_Swap.apply(x, 2, 1, group) for x in (q, k, v))
    return _Swap.apply(attention(q, k, v), 1, 2, group)
