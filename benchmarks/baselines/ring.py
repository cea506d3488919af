"""Ring Attention (arXiv 2310.01889): causal softmax attention whose keys and values pass from rank to rank.

Each rank folds the block that is with it into its outputs, normalised by a running log of the sum of exponentials,
while the next block is under way. Backward, keys and values pass again, each with the sum of its gradients; the
block's own rank adds its share when the sum comes home.
B sequences, n tokens on each of W ranks, H heads, G key heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Rotation:
    """Tensors under way to the next rank, and those that come from the one before."""

    def __init__(self, tensors: list[Tensor], group: Any) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        self._sent = [tensor.contiguous() for tensor in tensors]
        self.arriving = [torch.empty_like(tensor) for tensor in self._sent]
        operations = []
        for outgoing, incoming in zip(self._sent, self.arriving, strict=True):
            operations.append(dist.P2POp(dist.isend, outgoing, group=group, group_peer=(rank + 1) % size))
            operations.append(dist.P2POp(dist.irecv, incoming, group=group, group_peer=(rank - 1) % size))
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self.arriving


def _scores(q: Tensor, k: Tensor, scale: float, diagonal: bool) -> Tensor:
    """[B, H, n, n] in fp32 at least, -inf for keys after the query."""
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k).to(torch.promote_types(q.dtype, torch.float32))
    if diagonal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, group: Any) -> Tensor:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        repeat = q.shape[2] // k.shape[2]
        block = [k, v]
        o: Tensor | None = None
        log_sum: Tensor | None = None
        for hop in range(size):
            rotation = _Rotation(block, group) if hop < size - 1 else None
            if hop <= rank:  # the block is of rank - hop; blocks of later ranks only pass through
                keys, values = (t.repeat_interleave(repeat, 2) for t in block)
                scores = _scores(q, keys, scale, diagonal=hop == 0)
                sums = scores.logsumexp(-1, keepdim=True)
                part = torch.einsum("bhqk,bkhd->bhqd", (scores - sums).exp(), values.to(scores.dtype))
                if o is None or log_sum is None:
                    o, log_sum = part, sums
                else:
                    both = torch.logaddexp(log_sum, sums)
                    o, log_sum = o * (log_sum - both).exp() + part * (sums - both).exp(), both
            if rotation is not None:
                block = rotation.wait()
        assert o is not None  # every rank has a block of its own
        o = o.transpose(1, 2).to(q.dtype)
        ctx.scale, ctx.group = scale, group
        ctx.save_for_backward(q, k, v, o, log_sum)
        return o

    @staticmethod
    def backward(ctx: Any, d_o: Tensor) -> tuple[Any, ...]:
        q, k, v, o, log_sum = ctx.saved_tensors
        size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        repeat, wide = q.shape[2] // k.shape[2], log_sum.dtype
        correction = (d_o.to(wide) * o.to(wide)).sum(-1).transpose(1, 2)[..., None]
        dq = torch.zeros(q.shape, dtype=wide)
        own: tuple[Tensor, Tensor] | None = None
        block, sums = [k, v], [torch.zeros(k.shape, dtype=wide), torch.zeros(v.shape, dtype=wide)]
        for hop in range(size):
            rotation = _Rotation(block, ctx.group) if hop < size - 1 else None
            if hop <= rank:
                keys, values = (t.repeat_interleave(repeat, 2) for t in block)
                weights = (_scores(q, keys, ctx.scale, diagonal=hop == 0) - log_sum).exp()
                d_weights = torch.einsum("bqhd,bkhd->bhqk", d_o.to(wide), values.to(wide))
                d_scores = ctx.scale * weights * (d_weights - correction)
                dq += torch.einsum("bhqk,bkhd->bqhd", d_scores, keys.to(wide))
                dk = torch.einsum("bhqk,bqhd->bkhd", d_scores, q.to(wide))
                dv = torch.einsum("bhqk,bqhd->bkhd", weights, d_o.to(wide))
                dk, dv = (t.unflatten(2, (-1, repeat)).sum(3) for t in (dk, dv))
                if hop == 0:
                    own = dk, dv
                else:
                    sums = [sums[0] + dk, sums[1] + dv]
            if hop > 0:  # the sums follow their block; after the last hop they are home
                sums = _Rotation(sums, ctx.group).wait()
            if rotation is not None:
                block = rotation.wait()
        assert own is not None
        return dq.to(q.dtype), (own[0] + sums[0]).to(k.dtype), (own[1] + sums[1]).to(v.dtype), None, None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, group: Any, *, scale: float | None = None) -> Tensor:
    """Causal softmax attention over a sequence whose tokens lie on the ranks of `group`, consecutively.

    q [B, n, H, K], k [B, n, G, K], v [B, n, G, V], H a multiple of G -> o [B, n, H, V]. scale: K ** -0.5 by default.
    """
    return _Ring.apply(q, k, v, q.shape[3] ** -0.5 if scale is None else scale, group)
