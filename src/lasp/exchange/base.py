"""The interface of an exchange."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.comm import Messages
from lasp.exchange.cost import Model
from lasp.exchange.payload import Payload


class ExchangeResult(NamedTuple):
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

    def __add__(self, other: object) -> Traffic:
        assert isinstance(other, Traffic)
        return Traffic(self.sent_bytes + other.sent_bytes, self.received_bytes + other.received_bytes)


class Line(NamedTuple):
    """The ranks in the order in which the state passes them. A position is a place in that order."""

    comm: Messages
    reverse: bool

    @property
    def size(self) -> int:
        return self.comm.size

    @property
    def position(self) -> int:
        """This rank's."""
        return self.rank(self.comm.rank)

    def rank(self, position: int) -> int:
        """The rank at a position, and the position of a rank."""
        return self.comm.size - 1 - position if self.reverse else position


class PendingExchange(Protocol):
    """An exchange under way. Local work belongs between `begin` and `wait`."""

    def wait(self) -> ExchangeResult: ...


class Exchange(Protocol):
    """A schedule that carries the state over the ranks of a group.

    `begin` takes this rank's summary and the state that enters the first rank, the same on every rank. With
    `reverse`, ranks run from the last to the first: adjoint summaries then carry gradients. The fold is done
    locally, in rank order: results never depend on the network.
    """

    @property
    def name(self) -> str:
        """What the ranks must agree on: the schedule and all its parameters."""
        ...

    def begin(
        self, comm: Messages, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool
    ) -> PendingExchange: ...

    def traffic(self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool) -> Traffic:
        """The exact payload of one exchange on the rank at `position`.

        Both `position` and `nodes` (how many consecutive ranks share a host, host after host) are in the direction
        of the exchange.
        """
        ...

    def seconds(self, model: Model, *, want_total: bool) -> float:
        """The predicted time of one exchange, until the last rank has what it waits for."""
        ...


def broadcast_traffic(load: Payload, position: int, size: int) -> Traffic:
    """The payload of the total, sent by the last rank to all."""
    if position == size - 1:
        return Traffic(load.state_bytes * (size - 1), 0)
    return Traffic(0, load.state_bytes)
