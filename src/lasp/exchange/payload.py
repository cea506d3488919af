"""Sizes of what an exchange carries, the same on every rank, and its cut into parts that evolve on their own.

A state is cut along its heads (batch x heads: they never mix), or along V where there are fewer heads than parts.
Both are right for every transition; a cut along K would be wrong for dense ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from lasp.algebra import Summary


class Cut(NamedTuple):
    """Consecutive parts, along heads or along V; part i is `bounds[i]` up to `bounds[i + 1]`."""

    along_heads: bool
    bounds: tuple[int, ...]

    def of_state(self, state: Tensor, index: int) -> Tensor:
        """Part `index` of a state [heads, K, V]."""
        start, end = self.bounds[index], self.bounds[index + 1]
        return state[start:end] if self.along_heads else state[..., start:end]

    def of_summary(self, summary: Summary, index: int) -> Summary:
        """Part `index` of a flat summary. Along V every part keeps the whole transition."""
        state = self.of_state(summary.state, index)
        if not self.along_heads:
            return Summary(summary.transition, state)
        start, end = self.bounds[index], self.bounds[index + 1]
        parts = (tensor[start:end] for tensor in summary.transition.tensors())
        return Summary(type(summary.transition)(*parts), state)


@dataclass(frozen=True)
class Payload:
    """Sizes of a summary.

    Attributes:
        heads: independent states, batch x heads.
        keys, values: K and V.
        transition: numbers stored for one head's transition: 0, 1, K or K * K.
        itemsize: bytes of a number, 4 or 8.
    """

    heads: int
    keys: int
    values: int
    transition: int
    itemsize: int = 4

    @classmethod
    def of(cls, summary: Summary) -> Payload:
        state = summary.state
        keys, values = state.shape[-2:]
        heads = state.shape[:-2].numel()
        stored = sum(tensor.numel() for tensor in summary.transition.tensors())
        return cls(heads, keys, values, stored // max(heads, 1), state.element_size())

    @property
    def state_bytes(self) -> int:
        return self.heads * self.keys * self.values * self.itemsize

    @property
    def summary_bytes(self) -> int:
        return self.state_bytes + self.heads * self.transition * self.itemsize

    @property
    def is_dense(self) -> bool:
        return self.transition > self.keys

    def cut(self, count: int) -> Cut:
        """Cut into `count` parts that differ by at most one head, or one column; some may be empty."""
        along_heads = self.heads >= count
        whole = self.heads if along_heads else self.values
        return Cut(along_heads, _bounds(whole, count))

    def part(self, cut: Cut, index: int) -> Payload:
        """The sizes of one part; of an empty one nothing is sent, its transition neither."""
        length = cut.bounds[index + 1] - cut.bounds[index]
        return replace(self, heads=length) if cut.along_heads or length == 0 else replace(self, values=length)


@lru_cache(maxsize=64)
def _bounds(whole: int, count: int) -> tuple[int, ...]:
    return tuple(whole * index // count for index in range(count + 1))


def flat(state: Tensor) -> Tensor:
    """A state [..., K, V] as [heads, K, V]."""
    return state.reshape(-1, *state.shape[-2:])


def flatten(summary: Summary) -> Summary:
    """The summary with its leading dims as one, heads: state [heads, K, V]."""
    lead = summary.state.dim() - 2
    transition = summary.transition
    parts = (tensor.reshape(-1, *tensor.shape[lead:]) for tensor in transition.tensors())
    return Summary(type(transition)(*parts), flat(summary.state))


def select_heads(summary: Summary, index: Tensor) -> Summary:
    """Some heads of a flat summary."""
    transition = summary.transition
    return Summary(type(transition)(*(tensor[index] for tensor in transition.tensors())), summary.state[index])
