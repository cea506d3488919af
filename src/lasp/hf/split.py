"""The way in which one model's passes are split: ranks, the exchange of softmax layers, kernels."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakSet

from lasp.hf.shards import BatchShard
from lasp.sequence import SequenceParallel
from lasp.softmax.functions import chosen_method

_MAX_LENGTHS = 64


class SplitArguments(NamedTuple):
    """Arguments of the operators of a split pass."""

    sp: SequenceParallel | None
    cu_seqlens: tuple[int, ...] | None


class ModelSplit:
    """A parallelized model's.

    Attributes:
        sp: the ranks, or None for one process.
        files: of transformers, whose functions are dispatched for it.
        is_whole: for now the model is to run whole, also where gradients are wanted.
        is_prefill: for now a split pass fills a cache.
        num_passes: so far, the same on every rank.
    """

    def __init__(self, sp: SequenceParallel | None, softmax_method: str, backend: str, files: frozenset[str]) -> None:
        self.sp, self.softmax_method, self.backend, self.files = sp, softmax_method, backend, files
        self.is_whole = self.is_prefill = False
        self.num_passes = 0
        self._with_lengths: dict[tuple[int, ...], SequenceParallel] = {}
        _alive.add(self)

    def arguments(self, shard: BatchShard) -> SplitArguments:
        """Arguments of operators on tokens of this shard."""
        if self.sp is None:
            return SplitArguments(None, shard.cu_seqlens)
        ranks = self._with_lengths.get(shard.lengths)
        if ranks is None:
            if len(self._with_lengths) >= _MAX_LENGTHS:
                self._with_lengths.clear()
            ranks = self._with_lengths[shard.lengths] = self.sp.with_lengths(shard.lengths)
        return SplitArguments(ranks, shard.cu_seqlens)

    @property
    def gathers_latents(self) -> bool:
        """Layers that make their keys of latents exchange these, but where heads are to be traded."""
        return self.sp is not None and self.sp.size > 1 and self.softmax_method != "ulysses"

    def method(self, heads: int, window: int | None = None) -> str:
        """The exchange of a softmax layer with so many query heads, whose tokens see so many others."""
        if self.softmax_method != "auto":
            return self.softmax_method
        return chosen_method(heads, 1 if self.sp is None else self.sp.size, window)

    def __deepcopy__(self, memo: Any) -> ModelSplit:
        """A copied model's: over the same ranks, which cannot be copied."""
        return ModelSplit(self.sp, self.softmax_method, self.backend, self.files)


_alive: WeakSet[ModelSplit] = WeakSet()


def is_used(file: str) -> bool:
    """Returns whether there is a parallelized model of this file of transformers."""
    return any(file in split.files for split in _alive)


def end(split: ModelSplit) -> None:
    """Forget a model's that is restored."""
    _alive.discard(split)
