"""The interface of an exchange."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.comm import Comm


class Carried(NamedTuple):
    """What an exchange brings.

    Attributes:
        entering: the state that enters this rank's shard: all earlier ranks applied to the initial state.
        total: the state after all ranks, the same on every rank; None unless asked for.
    """

    entering: Tensor
    total: Tensor | None


class Traffic(NamedTuple):
    """Payload of one exchange on one rank; a byte counts once for every rank that gets it."""

    sent_bytes: int
    received_bytes: int


class PendingExchange(Protocol):
    """An exchange under way. Local work belongs between `begin` and `wait`."""

    def wait(self) -> Carried: ...


class Exchange(Protocol):
    """A schedule that carries the state over the ranks of a group.

    `begin` takes this rank's summary and the state that enters the first rank, the same on every rank. With
    `reverse`, ranks run from the last to the first: adjoint summaries then carry gradients. The fold is done
    locally, in rank order: results never depend on the network.
    """

    name: str

    def begin(
        self, comm: Comm, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool
    ) -> PendingExchange: ...

    def traffic(self, state_bytes: int, summary_bytes: int, rank: int, size: int, *, want_total: bool) -> Traffic:
        """The exact payload of one exchange; `rank` counts from the first in the exchange's direction."""
        ...
