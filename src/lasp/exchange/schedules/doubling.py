"""The log-step scan (Hillis and Steele, 1986): at step d = 1, 2, 4, ... every rank sends to the rank d further.

What a rank sends is the summary of itself and the ranks before it that it has heard of, so after ceil(log2 size)
steps every rank has those of all before it. A rank that has heard of the first one knows the state itself: from
then on it sends the state alone, without a transition. For dense transitions that is half of the message.
"""

from __future__ import annotations

from torch import Tensor

from lasp.algebra import Summary, compose
from lasp.distributed.call import Line, Messages
from lasp.distributed.comm import Pending as Message
from lasp.exchange.base import Exchange, ExchangeResult, Traffic, broadcast_traffic
from lasp.exchange.cost import Model
from lasp.exchange.payload import Payload


class PendingDoubling:
    def __init__(self, line: Line, summary: Summary, initial: Tensor, want_total: bool) -> None:
        self._line, self._summary, self._want_total = line, summary, want_total
        # The ranks before this one as far as heard of: either the state they leave, or their summary.
        self._entering: Tensor | None = initial if line.position == 0 else None
        self._before: Summary | None = None
        self._messages = self._step(1)

    def _step(self, distance: int) -> list[Message[Tensor]]:
        """Start the messages of one step."""
        line, own = self._line, self._summary
        position = line.position
        sends, receives = [], []
        if position + distance < line.size:
            if self._entering is not None:
                content = own.apply(self._entering)
            else:
                content = (own if self._before is None else compose(own, self._before)).pack()
            sends = [(content, line.rank(position + distance))]
        if position >= distance:
            like = own.state if _is_state(position - distance, distance) else own.pack()
            receives = [(like, line.rank(position - distance))]
        return line.comm.batch_send_recv(sends, receives)

    def wait(self) -> ExchangeResult:
        line, own, distance = self._line, self._summary, 1
        while distance < line.size:
            for message in self._messages:
                content = message.wait()
                if _is_state(line.position - distance, distance):
                    self._entering = content if self._before is None else self._before.apply(content)
                else:
                    early = own.unpack_like(content)
                    self._before = early if self._before is None else compose(self._before, early)
            distance *= 2
            if distance < line.size:
                self._messages = self._step(distance)
        entering, last = self._entering, line.size - 1
        assert entering is not None
        if not self._want_total:
            return ExchangeResult(entering, None)
        leaving = own.apply(entering) if line.position == last else entering
        return ExchangeResult(entering, line.comm.broadcast(leaving, line.rank(last)))


def _is_state(sender: int, distance: int) -> bool:
    """True if the rank at position `sender` has heard of the first rank before it sends over `distance`."""
    return sender < distance


class Doubling(Exchange):
    """Log-step exclusive scan, for any number of ranks."""

    name = "doubling"

    def begin(
        self, comm: Messages, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool
    ) -> PendingDoubling:
        return PendingDoubling(Line(comm, reverse), summary, initial, want_total)

    def traffic(self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool) -> Traffic:
        size, total, distance = sum(nodes), Traffic(0, 0), 1
        while distance < size:
            sent = load.state_bytes if _is_state(position, distance) else load.summary_bytes
            received = load.state_bytes if _is_state(position - distance, distance) else load.summary_bytes
            total += Traffic(sent * (position + distance < size), received * (position >= distance))
            distance *= 2
        return total + broadcast_traffic(load, position, size) if want_total else total

    def seconds(self, model: Model, *, want_total: bool) -> float:
        load, seconds, distance = model.load, 0.0, 1
        while distance < model.size:
            # The ranks at the end of the line still send summaries where any but the first `distance` send.
            is_state = model.size - 1 - distance < distance
            seconds += model.send(load.state_bytes if is_state else load.summary_bytes, model.size - distance)
            # What came joins what is known of the ranks before; for the next message the own summary goes in front.
            first = distance == 1
            seconds += (
                model.apply_summary()
                if first
                else model.apply_summary() + (model.apply_summary() if is_state else model.compose())
            )
            distance *= 2
        return seconds + model.apply_summary(alone=True) + model.broadcast(load.state_bytes) if want_total else seconds
