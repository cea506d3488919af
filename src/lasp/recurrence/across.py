"""What a backend sees of the ranks that share a sequence."""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

from torch import Tensor

from lasp.algebra import Summary


class PendingState(Protocol):
    """An exchange under way."""

    def wait(self) -> Any:
        """With `entering`, the state that enters this rank, and `total`, the one that leaves the last, if wanted."""


class Across(Protocol):
    """The ranks in one pass over them, forward or backward: `lasp.sequence.call.SequenceCall`."""

    @property
    def rank(self) -> int: ...

    def adjoint(self) -> Across:
        """The ranks in the pass that takes this one's gradients, which is told to them."""

    def begin(
        self, x: Any, summary: Summary, initial: Tensor | None, *, reverse: bool = False, want_total: bool = False
    ) -> PendingState:
        """Start to carry the state over the ranks, from the last to the first if `reverse`.

        Args:
            x: the run, for what its decays tell of the other ranks'.
            summary: this rank's.
            initial: what enters the first rank (the last, if `reverse`); zero if None.
            want_total: the state after all ranks is wanted too.
        """

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, added in their order."""


_of_key: WeakValueDictionary[int, Any] = WeakValueDictionary()
_new_key = count().__next__


def register(across: Any) -> int:
    """A key of this object."""
    key = _new_key()
    _of_key[key] = across
    return key


def of_key(key: int) -> Any:
    """The object of a `key`, while it lives."""
    return _of_key[key]
