"""A run of tokens as one affine map on the state, and the scan over runs.

A run (chunk, segment or shard) maps the state that enters it to `transition(state) + added`. That pair is its
summary. Summaries compose associatively, so any cut of a sequence into runs gives the same states, and the scan
over chunks, over segments and over ranks is one and the same. Gradients flow through the same scan, from the last
run to the first, with transposed transitions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.algebra.transition import Transition


@dataclass(frozen=True)
class Summary:
    """A run as S -> transition(S) + state.

    Attributes:
        transition: what the run does to the state that enters it.
        state: [..., K, V], what the run adds, i.e. its final state from a zero initial state; fp32 or fp64.
    """

    transition: Transition
    state: Tensor

    def apply(self, state: Tensor | None) -> Tensor:
        """The state after the run when `state` enters it, or nothing if None."""
        return self.state if state is None else self.transition.apply(state) + self.state

    def __getitem__(self, index: int | slice) -> Summary:
        return Summary(self.transition[index], self.state[index])

    @property
    def nbytes(self) -> int:
        """Bytes of the packed summary: what crosses the wire where both parts are sent."""
        return sum(t.numel() * t.element_size() for t in (*self.transition.tensors(), self.state))

    def pack(self) -> Tensor:
        """Both parts in one flat tensor of the state's dtype."""
        return torch.cat([t.reshape(-1) for t in (*self.transition.tensors(), self.state)])

    def unpack_like(self, flat: Tensor) -> Summary:
        """The summary that `pack` made `flat` from, on a rank whose summary has this one's shapes."""
        shape = self.state.shape
        tail = self.transition.tail_shape(shape)
        if tail is None:
            return Summary(self.transition, flat.view(shape))
        stored, state = flat.split([math.prod(tail), self.state.numel()])
        return Summary(type(self.transition)(stored.view(tail)), state.view(shape))  # type: ignore[call-arg]


def compose(late: Summary, early: Summary) -> Summary:
    """The summary of `early` followed by `late`."""
    return Summary(late.transition.compose(early.transition), late.apply(early.state))


def scan(runs: Summary, initial: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The state at the start of every run, and after the last.

    Args:
        runs: summaries of consecutive runs, stacked along a leading axis [N, ..., K, V].
        initial: [..., K, V], the state that enters the first run; in its dtype the state is carried.
        reverse: walk from the last run to the first: with adjoint summaries this gives the gradient of the state
            at the *end* of every run, and at the start of the first.

    Returns:
        entering [N, ..., K, V] and the state left at the end [..., K, V].
    """
    entering = torch.empty_like(runs.state)
    count = runs.state.shape[0]
    state = initial
    for index in reversed(range(count)) if reverse else range(count):
        entering[index] = state
        state = runs[index].apply(state)
    return entering, state
