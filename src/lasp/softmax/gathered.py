"""Softmax attention in two steps: keys and values of all ranks, or what they are made of, and then the attention.

For layers that make keys and values of few numbers a token, such as the latents of multi-head latent attention
(arXiv 2405.04434): those are gathered, and every rank makes the keys that its queries see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.sequence import SequenceParallel
from lasp.sequence.shards import document_bounds, shard_starts
from lasp.softmax.blocks import blocks_of
from lasp.softmax.exchange import gather
from lasp.softmax.local import attend
from lasp.softmax.scores import ScoreOptions


def gather_rows(k: Tensor, v: Tensor, sp: SequenceParallel | None) -> tuple[Tensor, Tensor]:
    """k [B, T, H, D] and v [B, T, H_v, D_v] of this rank -> those of all ranks up to it.

    All ranks of `sp` must call. Gradients of rows that others have made come back to their rank.
    """
    starts = shard_starts(sp, k.shape[1])
    if sp is None:
        return k, v
    gradients = (k.requires_grad, v.requires_grad) if torch.is_grad_enabled() else None
    tokens = k.shape[1] if sp.lengths is None else "by lengths"
    fields = {
        "batch": k.shape[0],
        "tokens": tokens,
        "heads and dims of k and v": (*k.shape[2:], *v.shape[2:]),
        "dtype": str(k.dtype),
        "requires_grad": gradients,
    }
    call = sp.call("gathering of keys", tuple(fields.values()), lambda: fields, None, (k, v))
    return gather(k, v, call, starts, all_ranks=False)


def attend_to_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cu_seqlens: tuple[int, ...] | None,
    sp: SequenceParallel | None,
) -> Tensor:
    """Causal attention of q [B, T, H, D] to k [B, S, H_kv, D] and v [B, S, H_kv, D_v] of all ranks up to this one.

    Nothing crosses ranks. cu_seqlens: of the whole sequence, see `lasp.softmax_attention`. Returns o [B, T, H, D_v].
    """
    starts, rank = shard_starts(sp, q.shape[1]), 0 if sp is None else sp.rank
    bounds = document_bounds(cu_seqlens, starts[-1], q.shape[0])
    blocks = blocks_of(bounds, (0,) * len(bounds), starts[rank], starts[rank + 1], True)
    with torch.autocast(q.device.type, enabled=False):
        return attend(q, k, v, None, blocks, ScoreOptions(True, scale), backend="torch")
