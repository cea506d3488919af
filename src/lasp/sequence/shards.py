"""Shards: the tokens of a sequence that each rank holds, and where its documents start."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from torch import Tensor

from lasp.sequence.arguments import wholes
from lasp.sequence.sequence_parallel import SequenceParallel


def shard_starts(sp: SequenceParallel | None, tokens: int) -> tuple[int, ...]:
    """Global index of every rank's first token, and the length of the whole sequence: size + 1 numbers.

    tokens: how many this rank holds.
    """
    if sp is None:
        return (0, tokens)
    lengths = [tokens] * sp.size if sp.lengths is None else sp.lengths
    return (0, *accumulate(lengths))


def document_bounds(
    cu_seqlens: Tensor | Sequence[int] | None,
    total: int,
    batch: int,
    *,
    name: str = "cu_seqlens",
    whole: str = "the whole sequence (of all ranks together)",
) -> tuple[int, ...]:
    """Token where each document starts in the whole sequence, and its end: N + 1 numbers. Without packing, (0, total).

    Args:
        cu_seqlens: integers [N + 1], the same on every rank. Keep them on the host: to read them, a GPU is waited for.
        total: tokens of the whole sequence.
        batch: sequences of the batch.
        name, whole: of the argument, and of what has `total` tokens, in messages.

    Raises:
        ValueError: they do not rise from 0 to `total`, or the batch is not 1.
    """
    if cu_seqlens is None:
        return (0, total)
    bounds = wholes(name, cu_seqlens)
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairwise(bounds)):
        shown = bounds if len(bounds) <= 8 else (*bounds[:4], "..", *bounds[-3:])
        raise ValueError(f"{name} must rise from 0 to the {total} tokens of {whole}; got {shown}")
    if batch != 1:
        raise ValueError(f"packed documents lie in one sequence: with cu_seqlens the batch must be 1, got {batch}")
    return bounds


@lru_cache(maxsize=32)
def document_digest(bounds: tuple[int, ...]) -> str:
    """The digest by which ranks know that they mean the same documents."""
    return f"{len(bounds) - 1} documents, {hashlib.sha256(repr(bounds).encode()).hexdigest()[:16]}"
