"""Megatron's sequence parallelism (arXiv 2205.05198): tensor parallelism, activations cut along tokens in between.

Not sequence parallelism in LASP's sense: inside a block every rank has all tokens and some heads.
B sequences, n tokens on each of W ranks, D model width, H heads, h = H / W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Renamed in PyTorch 2.13; looked up when called, so that a counter sees the call.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def _gather(x: Tensor, group: Any) -> Tensor:
    """[B, n, D] -> [B, W n, D]."""
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    getattr(dist, _GATHER)(gathered.view(-1, *x.shape[1:]), x.contiguous(), group=group)
    return torch.cat(gathered.unbind(0), 1)


def _reduce_scatter(x: Tensor, group: Any) -> Tensor:
    """[B, W n, D], a summand on each rank -> [B, n, D], the sum."""
    parts = torch.cat(x.chunk(dist.get_world_size(group), 1))
    own = x.new_empty(x.shape[0], x.shape[1] // dist.get_world_size(group), x.shape[2])
    getattr(dist, _REDUCE_SCATTER)(own, parts, group=group)
    return own


class _GatheredLinear(torch.autograd.Function):
    """gather(x) @ weight^T. Only this rank's part of x is kept; backward gathers it again, as Megatron does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Any) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x, weight)
        return F.linear(_gather(x, group), weight)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        d_x = _reduce_scatter(d_y @ weight, ctx.group)
        d_weight = d_y.flatten(0, 1).T @ _gather(x, ctx.group).flatten(0, 1)
        return d_x, d_weight, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Any, ...]:
        return _gather(d_x, ctx.group), None


def attention_block(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    heads: int,
    group: Any,
) -> Tensor:
    """Projections and attention: this rank's h of all heads.

    Args:
        attention: of q, k [B, W n, h, K] and v [B, W n, h, V], softmax or linear, on one device.
        x: [B, n, D].
        qkv_weight: [3 h K, D], rows of this rank's queries, then keys, then values; K = V.
        out_weight: [D, h V].
        heads: h.

    Returns:
        [B, n, D].
    """
    q, k, v = _GatheredLinear.apply(x, qkv_weight, group).unflatten(-1, (3, heads, -1)).unbind(2)
    return _ReduceScatter.apply(F.linear(attention(q, k, v).flatten(-2), out_weight), group)


def feedforward_block(
    activation: Callable[[Tensor], Tensor], x: Tensor, up_weight: Tensor, down_weight: Tensor, group: Any
) -> Tensor:
    """down(activation(up(x))), this rank's part of the hidden channels: weights [F / W, D] and [D, F / W]."""
    return _ReduceScatter.apply(F.linear(activation(_GatheredLinear.apply(x, up_weight, group)), down_weight), group)
