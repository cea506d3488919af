"""Divides the keys that queries see into few dense blocks: one call of PyTorch's attention for several documents each.

Documents are separated by reading only their own keys, never by a mask: a mask multiplies what it hides by zero, and
zero times NaN is NaN. Parts of documents with equally many queries and keys here form one block, so thousands of
one-token documents are one call, and T tokens make at most about sqrt(2 T) + 2 calls.

Where queries see a window of keys only, a document is cut into tiles of queries, each with the keys that its windows
reach: nearly all of them are alike, and one block.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.recurrence.untraced import cached


class AttentionBlock(NamedTuple):
    """n documents, or parts of them, alike in shape.

    Attributes:
        queries, keys: how many of each, of one document here. Where attention is causal the last query sees all
            the keys, and each before it one key less.
        first_queries, first_keys: n first indices of each.
        window: how many of the keys each query sees, where it is not all of those up to its own.
    """

    queries: int
    keys: int
    first_queries: tuple[int, ...]
    first_keys: tuple[int, ...]
    window: int | None = None

    def of_queries(self, tensor: Tensor) -> Tensor:
        """[B, T, H, D] -> [B n, queries, H, D], the parts of each sequence one after another."""
        return _part(tensor, self.first_queries, self.queries)

    def of_keys(self, tensor: Tensor) -> Tensor:
        return _part(tensor, self.first_keys, self.keys)


class Blocks(NamedTuple):
    """All blocks of a shard.

    Attributes:
        order: int64 [T], where in the outputs of all blocks, one after another, each token's is; None where in order.
    """

    blocks: tuple[AttentionBlock, ...]
    order: Tensor | None


def _part(tensor: Tensor, first: tuple[int, ...], count: int) -> Tensor:
    if len(first) == 1:
        return tensor[:, first[0] : first[0] + count]
    index = torch.tensor(first)[:, None] + torch.arange(count)
    rows = tensor.index_select(1, index.flatten().to(tensor.device))
    return rows.view(tensor.shape[0] * len(first), count, *tensor.shape[2:])


# Tiles of windows: larger ones read fewer keys twice, and compute more scores that no query wants.
_FEWEST_TILED, _MOST_TILED = 64, 1024


@cached(32)
def blocks_of(
    bounds: tuple[int, ...],
    before: tuple[int, ...],
    first: int,
    last: int,
    causal: bool,
    window: int | None = None,
    first_key: int = 0,
) -> Blocks:
    """The blocks of the queries first .. last - 1 of a sequence.

    bounds: where each document starts, and the length of the whole sequence.
    before: where each document's rows start in the initial state, and how many rows that has. A document's keys are
        those rows and then its tokens; see `keys_of`.
    window: keys that a query sees, itself among them; None for all.
    first_key: where in the sequence the keys start that are here.
    """
    groups: dict[tuple[int, int, int | None], list[tuple[int, int]]] = {}
    for index, (start, end) in enumerate(pairwise(bounds)):
        here, stop, rows = max(start, first), min(end, last), before[index + 1] - before[index]
        place = before[index] + start - first_key
        if stop <= here:
            continue
        if window is None or rows + stop - start <= window:
            keys = rows + (stop if causal else end) - start
            groups.setdefault((stop - here, keys, None), []).append((here - first, place))
            continue
        step = min(max(window, _FEWEST_TILED), _MOST_TILED)
        for tile in range(here, stop, step):
            until = min(tile + step, stop)
            skipped = max(0, rows + tile - start - window + 1)
            keys = rows + until - start - skipped
            shape = (until - tile, keys, window if keys > window else None)
            groups.setdefault(shape, []).append((tile - first, place + skipped))
    blocks = tuple(
        AttentionBlock(queries, keys, tuple(first for first, _ in places), tuple(key for _, key in places), seen)
        for (queries, keys, seen), places in groups.items()
    )
    if sum(len(block.first_queries) for block in blocks) <= 1:
        return Blocks(blocks, None)
    with torch.inference_mode(False):  # blocks made while generating may serve training, which saves the order
        tokens = [torch.tensor(b.first_queries)[:, None] + torch.arange(b.queries) for b in blocks]
        return Blocks(blocks, torch.cat([t.flatten() for t in tokens]).argsort())


@cached(32)
def keys_of(bounds: tuple[int, ...], before: tuple[int, ...], tokens: int) -> Tensor:
    """int64 [rows of the initial state + tokens]: which of these, one after another, make the keys of all documents.

    Each document's rows of the initial state come before its tokens, of which there are the sequence's first `tokens`.
    """
    places: list[int] = []
    for index, (start, end) in enumerate(pairwise(bounds)):
        places += range(before[index], before[index + 1])
        places += range(before[-1] + start, before[-1] + min(end, tokens))
    with torch.inference_mode(False):
        return torch.tensor(places, dtype=torch.int64)
