"""The interface of an exchange."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.call import Messages
from lasp.exchange.cost import Constants, Model
from lasp.exchange.payload import Payload


class ExchangeResult(NamedTuple):
    """States that an exchange brings.

    Attributes:
        entering: the state that enters this rank's shard: all earlier ranks applied to the initial state. None for
            zero, where that was given as None.
        total: the state after all ranks, the same on every rank; None unless asked for.
    """

    entering: Tensor | None
    total: Tensor | None


class ConstantDecays(NamedTuple):
    """Decays that all ranks know beforehand.

    Attributes:
        log_decay: [H], natural logarithm of a head's decay of one token.
        lengths: tokens of every rank.
        batch: sequences.
    """

    log_decay: Tensor
    lengths: Sequence[int]
    batch: int


class Traffic(NamedTuple):
    """Payload of one exchange on one rank; a byte counts once for every rank that gets it."""

    sent_bytes: int
    received_bytes: int

    def __add__(self, other: object) -> Traffic:
        assert isinstance(other, Traffic)
        return Traffic(self.sent_bytes + other.sent_bytes, self.received_bytes + other.received_bytes)


class PendingExchange(Protocol):
    """An exchange under way. Local work belongs between `begin` and `wait`."""

    def wait(self) -> ExchangeResult: ...


class Exchange(ABC):
    """A schedule that carries the state over the ranks of a group.

    `begin` takes this rank's summary and the state that enters the first rank, the same on every rank. With
    `reverse`, ranks run from the last to the first: adjoint summaries then carry gradients. The fold is done
    locally, in rank order: results never depend on the network.

    Schedules derive from this class. What the door to an exchange (`lasp.exchange.start`) must know of one:

    Attributes:
        wants_own_stream: it computes between its messages, which must not wait behind local work.
        accepts_zero_initial: `initial` may be None for zero, which then is not multiplied.
        selects: it is a choice among others, made by `selected` once for what is carried.
    """

    wants_own_stream: ClassVar[bool] = True
    accepts_zero_initial: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The schedule and all its parameters, on which the ranks must agree."""
        ...

    @abstractmethod
    def begin(
        self, comm: Messages, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool
    ) -> PendingExchange: ...

    @classmethod
    def is_selectable(cls, nodes: tuple[int, ...], *, peers: bool) -> bool:
        """True if "auto" may select it. peers: the ranks can write into each other's memory."""
        return True

    @classmethod
    def made_for(cls, constants: Constants) -> Exchange:
        """The schedule as ranks run it whose messages take what these constants say."""
        return cls()

    def selected(self, comm: Messages, summary: Summary, *, want_total: bool) -> Exchange:
        """The schedule that carries such summaries: this one, unless it chooses. Collective when first asked."""
        return self

    def informed(self, decays: ConstantDecays) -> Exchange:
        """The schedule for runs with these decays, of which all ranks know: this one, unless it can do with less."""
        return self

    @abstractmethod
    def traffic(self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool) -> Traffic:
        """The exact payload of one exchange on the rank at `position`.

        Both `position` and `nodes` (how many consecutive ranks share a host, host after host) are in the direction
        of the exchange.
        """
        ...

    @abstractmethod
    def seconds(self, model: Model, *, want_total: bool) -> float:
        """The predicted time of one exchange, until the last rank has what it waits for."""
        ...


def broadcast_traffic(load: Payload, position: int, size: int) -> Traffic:
    """The payload of the total, sent by the last rank to all."""
    if position == size - 1:
        return Traffic(load.state_bytes * (size - 1), 0)
    return Traffic(0, load.state_bytes)
