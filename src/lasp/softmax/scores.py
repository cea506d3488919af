"""Attention whose scores are there as numbers: with soft caps, sinks and windows, and the definition of all of it.

    s_tj = scale q_t k_j, or softcap tanh(scale q_t k_j / softcap);  p_tj = exp(s_tj) / (sum_i exp(s_ti) + exp(sink))

over the keys i, j that t sees. PyTorch's kernels take none of the two. A tile of queries has its scores at a time, and
once more in the backward pass, so memory grows with the keys and not with their square.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.recurrence.derivatives import first_derivatives

# Scores alive at once.
_TILE_SCORES = 1 << 24


class ScoreOptions(NamedTuple):
    """Options of how scores are made of queries and keys."""

    causal: bool
    scale: float
    softcap: float | None = None


def seen_keys(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool [queries, keys]: the keys up to each query's own, the last `window` of them; the last of both are one."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def attend_by_scores(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int | None, options: ScoreOptions
) -> Tensor:
    """q [n, T, H, D], k and v [n, S, H_kv, ..], the last query beside the last key, sinks [H] -> [n, T, H, D_v]."""
    count = max(1, _TILE_SCORES // (q.shape[1] * q.shape[2] * k.shape[1]))
    parts = zip(q.split(count), k.split(count), v.split(count), strict=True)
    outputs: list[Tensor] = [_ByScores.apply(*part, sinks, window, options) for part in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _ByScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int | None, options: ScoreOptions
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.window, ctx.options = window, options
        return torch.cat([_tile(q, k, v, sinks, window, options, first, last) for first, last in _tiles(q, k)], 1)

    @staticmethod
    @first_derivatives("softmax_attention with a soft cap or sinks")
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        totals: list[Tensor | None] = [
            None if tensor is None or not needed else torch.zeros_like(tensor, dtype=_wide(tensor))
            for tensor, needed in zip(tensors, ctx.needs_input_grad[:4], strict=True)
        ]
        for first, last in _tiles(*tensors[:2]):
            with torch.enable_grad():
                leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in tensors]
                q, k, v, sinks = leaves
                o = _tile(q, k, v, sinks, ctx.window, ctx.options, first, last)
                wanted = [leaf for leaf, total in zip(leaves, totals, strict=True) if total is not None]
                found = iter(torch.autograd.grad(o, wanted, d_o[:, first:last]))
            for total in totals:
                if total is not None:
                    total += next(found)
        gradients = [
            None if total is None else total.to(tensor.dtype) for total, tensor in zip(totals, tensors, strict=True)
        ]
        return *gradients, None, None


def _tiles(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    queries = q.shape[1]
    step = max(1, _TILE_SCORES // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    return [(first, min(first + step, queries)) for first in range(0, queries, step)]


def _tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    window: int | None,
    options: ScoreOptions,
    first: int,
    last: int,
) -> Tensor:
    """The outputs of queries first .. last - 1, which see keys up to one that is computed here and no later ones."""
    later = q.shape[1] - last if options.causal else 0
    keys = k.shape[1] - later
    seen = seen_keys(last - first, keys, window, q.device) if options.causal else None
    wide = _wide(q)
    group = q.shape[2] // k.shape[2]
    # [n, H_kv, group, T, D]
    queries = q[:, first:last].to(wide).unflatten(2, (k.shape[2], group)).permute(0, 2, 3, 1, 4)
    scores = queries @ k[:, :keys].to(wide).permute(0, 2, 3, 1)[:, :, None] * options.scale
    weights = _weights(scores.flatten(1, 2), seen, sinks, options).unflatten(1, (k.shape[2], group))
    o = weights @ v[:, :keys].to(wide).transpose(1, 2)[:, :, None]
    return o.permute(0, 3, 1, 2, 4).flatten(2, 3).to(v.dtype)


def _weights(scores: Tensor, seen: Tensor | None, sinks: Tensor | None, options: ScoreOptions) -> Tensor:
    """scores [n, H, T, S] -> the same, softmax over the keys that are seen, and the sink."""
    if options.softcap is not None:
        scores = options.softcap * (scores / options.softcap).tanh()
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def reference_block(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int | None, options: ScoreOptions
) -> Tensor:
    """The same, query by query: each reads the keys it sees and no others. 16-bit inputs are computed in fp32."""
    group, dtype = q.shape[2] // k.shape[2], _wide(q)
    q = options.scale * q.to(dtype)
    k, values = (t.to(dtype).repeat_interleave(group, 2) for t in (k, v))
    outputs = []
    for index in range(q.shape[1]):
        last = k.shape[1] - q.shape[1] + index + 1 if options.causal else k.shape[1]
        first = 0 if window is None else max(0, last - window)
        scores = torch.einsum("bhd,bshd->bhs", q[:, index], k[:, first:last])
        weights = _weights(scores[:, :, None], None, sinks, options)[:, :, 0]
        outputs.append(torch.einsum("bhs,bshd->bhd", weights, values[:, first:last]))
    return torch.stack(outputs, 1).to(v.dtype)
