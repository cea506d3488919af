"""Causal attention within documents one after another, and its gradients: nothing differentiates it by itself.

On a GPU PyTorch's kernels for sequences of several lengths read each document's keys alone; elsewhere scores are made
of a tile of queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# First and last + 1 of each document's queries and keys here. The last of both see each other.
Spans = tuple[tuple[int, int, int, int], ...]

# Scores alive at once.
_TILE_SCORES = 1 << 24
# Of the memory-efficient kernels' custom_mask_type.
_LOWER_RIGHT = 2
# Channels are padded to a multiple of so many; the kernels take no more than the other.
_CHANNELS, MAX_CHANNELS = 8, 256
_ALIGNED_SUMS = 32  # of those for fp32
_FLASH = (torch.bfloat16, torch.float16)


def has_operators(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Say whether there is such attention there, for heads of so many channels at most."""
    return device.type == "cpu" or (dtype in (*_FLASH, torch.float32) and channels <= MAX_CHANNELS)


def attend_within(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k [B, S, H_kv, D], v [B, S, H_kv, D_v] -> o [B, T, H, D_v], and the logarithms of sums
    [H, B T]."""
    if not q.is_cuda:
        return _by_scores(q, k, v, spans, scale)
    if q.numel() == 0:
        return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[2], 0, dtype=torch.float32)
    lay, (q, k, v), width = _lay(q, k, spans), _dense(q, k, v), v.shape[3]
    if q.dtype in _FLASH:
        o, sums = torch.ops.aten._flash_attention_forward(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *lay[:4], 0.0, True, False, scale=scale
        )[:2]
        sums = sums.reshape(q.shape[2], -1)
    else:
        o, sums = torch.ops.aten._efficient_attention_forward(
            *_one_sequence(q, k, v), None, *lay[:4], 0.0, _LOWER_RIGHT, True, scale=scale
        )[:2]
        sums = sums.transpose(0, 1).flatten(1).index_select(1, lay.rows)
    return o.view(*q.shape[:3], -1)[..., :width].contiguous(), sums


def attend_within_gradients(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    if not q.is_cuda:
        return _by_scores_gradients(d_o, q, k, v, o, sums, spans, scale)
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    shapes, lay = (q.shape, k.shape, v.shape), _lay(q, k, spans)
    q, k, v, o, d_o = _dense(q, k, v, o, d_o)
    if q.dtype in _FLASH:
        seeds = q.new_empty(2, dtype=torch.uint64)  # of dropout, of which there is none
        found = torch.ops.aten._flash_attention_backward(
            *(t.flatten(0, 1) for t in (d_o, q, k, v, o)), sums, *lay[:4], 0.0, True, seeds,
            seeds[:0], scale=scale,
        )  # fmt: skip
    else:
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        padded = sums.new_full((q.shape[2], (len(lay.queries) - 1) * _padded(lay.most_queries)), torch.inf)
        padded = padded.index_copy(1, lay.rows, sums).unflatten(1, (-1, _padded(lay.most_queries))).transpose(0, 1)
        wide_q, wide_k, wide_v = _one_sequence(q, k, v)
        found = torch.ops.aten._efficient_attention_backward(
            d_o.flatten(0, 1)[None], wide_q, wide_k, wide_v, None, o.flatten(0, 1)[None], *lay[:4],
            padded.contiguous(), 0.0, seed, seed, _LOWER_RIGHT, False, scale=scale,
        )[:3]  # fmt: skip
    d_q, d_k, d_v = (t.view(q.shape[0], -1, *t.shape[-2:]) for t in found)
    groups = q.shape[2] // k.shape[2]
    if d_k.shape[2] != k.shape[2]:
        d_k, d_v = (t.unflatten(2, (-1, groups)).sum(3) for t in (d_k, d_v))
    d_q, d_k, d_v = (t[..., : shape[3]].contiguous() for t, shape in zip((d_q, d_k, d_v), shapes, strict=True))
    for unseen in (d_k[:, : spans[0][2]], d_v[:, : spans[0][2]]):
        unseen.zero_()  # which no kernel writes
    return d_q, d_k, d_v


class Lay(NamedTuple):
    """Places of documents, on the device.

    Attributes:
        queries, keys: int32 [N + 1], where each document's begin, and the last one's end.
        most_queries, most_keys: of a document.
        rows: int64 [B T], where the kernels for fp32 have each query's sum, of padded documents.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    rows: Tensor


def _padded(queries: int) -> int:
    return -(-queries // _ALIGNED_SUMS) * _ALIGNED_SUMS


def _lay(q: Tensor, k: Tensor, spans: Spans) -> Lay:
    return _lay_of(spans, q.shape[0], q.shape[1], k.shape[1], q.device)


@lru_cache(maxsize=16)
def _lay_of(spans: Spans, batch: int, tokens: int, keys: int, device: torch.device) -> Lay:
    """Lay every sequence of the batch one after another. Keys before the first document's, which no query here sees,
    there are in a batch of one alone."""
    of_queries, of_keys = [0], [spans[0][2]]
    for sequence in range(batch):
        of_queries += [tokens * sequence + stop for _, stop, _, _ in spans]
        of_keys += [keys * sequence + stop for _, _, _, stop in spans]
    most = (max(stop - start for start, stop, _, _ in spans), max(stop - start for _, _, start, stop in spans))
    each = [document * _padded(most[0]) + torch.arange(b - a) for document, (a, b) in enumerate(pairwise(of_queries))]
    with torch.inference_mode(False):
        first, second = (torch.tensor(each, dtype=torch.int32, device=device) for each in (of_queries, of_keys))
        return Lay(first, second, *most, torch.cat(each).to(device))


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Give them as the kernels read them: alike in channels, a multiple of eight, zeros behind."""
    width = -(-max(t.shape[3] for t in tensors) // _CHANNELS) * _CHANNELS
    return [F.pad(t, (0, width - t.shape[3])).contiguous() for t in tensors]


def _one_sequence(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """[1, B T, H, D], with a key head for every query head, which the kernels do not share."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (t.repeat_interleave(groups, 2) for t in (k, v))
    return [t.flatten(0, 1)[None] for t in (q, k, v)]


class _Tile(NamedTuple):
    """Some queries of a document with all the keys that they see, heads first and in the sums' dtype.

    Attributes:
        rows, columns: of the queries and the keys, among all.
        q: [B, H_kv, G, t, D]. k: [B, H_kv, 1, s, D]. v: likewise.
        scores: [B, H_kv, G, t, s], -inf where a key is not seen.
    """

    rows: slice
    columns: slice
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor


def _tiles(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> Iterator[_Tile]:
    for start, stop, first_key, last_key in spans:
        step = max(1, _TILE_SCORES // max(1, q.shape[0] * q.shape[2] * (last_key - first_key)))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            rows, columns = slice(first, last), slice(first_key, last_key - (stop - last))
            queries, keys, values = (_heads_first(t, k.shape[2]) for t in (q[:, rows], k[:, columns], v[:, columns]))
            scores = queries @ keys.mT * scale
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
            yield _Tile(rows, columns, queries, keys, values, scores.masked_fill(~seen, -torch.inf))


def _heads_first(tensor: Tensor, key_heads: int) -> Tensor:
    """[B, t, H, D] -> [B, H_kv, G, t, D]."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return wide.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4)


def _tokens_first(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _by_scores(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    o = v.new_empty(*q.shape[:3], v.shape[3])
    sums = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for tile in _tiles(q, k, v, spans, scale):
        total = tile.scores.logsumexp(-1, keepdim=True)
        o[:, tile.rows] = _tokens_first((tile.scores - total).exp() @ tile.v).to(o.dtype)
        sums[:, tile.rows] = _tokens_first(total)[..., 0]
    return o, sums.flatten(0, 1).t().contiguous()


def _by_scores_gradients(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    totals: list[Any] = [torch.zeros_like(t, dtype=sums.dtype) for t in (q, k, v)]
    sums = sums.t().reshape(q.shape[:3])[..., None]
    d_q, d_k, d_v = totals
    for tile in _tiles(q, k, v, spans, scale):
        total, d, read = (_heads_first(t[:, tile.rows], k.shape[2]) for t in (sums, d_o, o))
        weights = (tile.scores - total).exp()
        d_scores = weights * (d @ tile.v.mT - (d * read).sum(-1, keepdim=True)) * scale
        d_q[:, tile.rows] += _tokens_first(d_scores @ tile.k)
        d_k[:, tile.columns] += _tokens_first((d_scores.mT @ tile.q).sum(2, keepdim=True))
        d_v[:, tile.columns] += _tokens_first((weights.mT @ d).sum(2, keepdim=True))
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)
