"""Divides the keys that queries see into few dense blocks: one call of PyTorch's attention for several documents each.

Documents are separated by reading only their own keys, never by a mask: a mask multiplies what it hides by zero, and
zero times NaN is NaN. Parts of documents with equally many queries and keys here form one block, so thousands of
one-token documents are one call, and T tokens make at most about sqrt(2 T) + 2 calls.
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
    """

    queries: int
    keys: int
    first_queries: tuple[int, ...]
    first_keys: tuple[int, ...]

    def of_queries(self, tensor: Tensor) -> Tensor:
        """[B, T, H, D] -> [n, queries, H, D], or B in place of n for a single document."""
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
    return rows.view(len(first), count, *tensor.shape[2:])


@cached(32)
def blocks_of(bounds: tuple[int, ...], before: tuple[int, ...], first: int, last: int, causal: bool) -> Blocks:
    """The blocks of the queries first .. last - 1 of a sequence.

    bounds: where each document starts, and the length of the whole sequence.
    before: where each document's rows start in the initial state, and how many rows that has. A document's keys are
        those rows and then its tokens; see `keys_of`.
    """
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for index, (start, end) in enumerate(pairwise(bounds)):
        here, stop = max(start, first), min(end, last)
        if stop > here:
            keys = before[index + 1] - before[index] + (stop if causal else end) - start
            groups.setdefault((stop - here, keys), []).append((here - first, before[index] + start))
    blocks = tuple(AttentionBlock(*shape, *zip(*places, strict=True)) for shape, places in groups.items())
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
