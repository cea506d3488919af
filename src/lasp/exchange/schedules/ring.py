"""LASP's exchange (arXiv 2404.02882): the state goes from rank to rank, each applying its own summary.

Least volume, one state per rank and direction whatever the transition, and a chain of size - 1 messages. Unlike in
the authors' code a rank receives only when it waits, so the ranks' local work is not serialised.
"""

from __future__ import annotations

from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.call import Line, Messages
from lasp.distributed.comm import Pending as Message
from lasp.exchange.base import Exchange, ExchangeResult, Traffic, broadcast_traffic
from lasp.exchange.cost import Model
from lasp.exchange.payload import Payload


class PendingRing:
    def __init__(
        self, line: Line, summary: Summary, initial: Tensor | None, message: Message[Tensor] | None, want_total: bool
    ) -> None:
        self._line, self._summary, self._initial = line, summary, initial
        self._message, self._want_total = message, want_total

    def wait(self) -> ExchangeResult:
        line, last = self._line, self._line.size - 1
        entering = self._initial if self._message is None else self._message.wait()
        if line.position == last and not self._want_total:
            return ExchangeResult(entering, None)
        leaving = self._summary.apply(entering)
        if line.position < last:
            line.comm.send(leaving, line.rank(line.position + 1))
        return ExchangeResult(entering, line.comm.broadcast(leaving, line.rank(last)) if self._want_total else None)


class Ring(Exchange):
    """Point-to-point, neighbour to neighbour."""

    name = "ring"
    accepts_zero_initial = True

    def begin(
        self, comm: Messages, summary: Summary, initial: Tensor | None, *, reverse: bool, want_total: bool
    ) -> PendingRing:
        line = Line(comm, reverse)
        message = None
        if line.position > 0:
            message = comm.receive(summary.state, line.rank(line.position - 1))
        return PendingRing(line, summary, initial, message, want_total)

    def traffic(self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool) -> Traffic:
        size, state = sum(nodes), load.state_bytes
        chain = Traffic(state * (position < size - 1), state * (position > 0))
        return chain + broadcast_traffic(load, position, size) if want_total else chain

    def seconds(self, model: Model, *, want_total: bool) -> float:
        seconds = model.pipeline(1)
        if want_total:
            seconds += model.apply_summary(alone=True) + model.broadcast(model.load.state_bytes)
        return seconds
