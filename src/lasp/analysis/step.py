"""A training step as programs for the simulator: layers, the exchange of each, the sum of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lasp.analysis.simulator import Join, Program, Receive, Send, SimulatedWork, Wait
from lasp.exchange.base import Exchange
from lasp.exchange.cost import Constants, Model
from lasp.exchange.payload import Payload

# Schedules that are simulated message by message; others take the time of their cost model once all have come.
BY_MESSAGE = ("ring", "doubling", "pipelined")
BUCKET_BYTES = 25 << 20


class Pieces(NamedTuple):
    """Seconds of one layer on one rank: work before the exchange, while it is under way, and after it."""

    before: float
    during: float
    after: float


class Step(NamedTuple):
    """One rank's step.

    Attributes:
        layers: number of layers that exchange a state.
        forward, backward: of each of them.
        outside_forward, outside_backward: embedding, loss, head.
        optimizer: seconds.
        load: what is exchanged. exchange: how, and `name` of it in lasp.exchange.EXCHANGES.
        reduce_s: seconds to sum the gradients of so many bytes over all ranks.
        gradient_bytes: of one layer, and of what is outside the layers.
    """

    layers: int
    forward: Pieces
    backward: Pieces
    outside_forward: float
    outside_backward: float
    optimizer: float
    load: Payload
    exchange: Exchange
    name: str
    constants: Constants
    nodes: tuple[int, ...]
    reduce_s: Callable[[float], float]
    gradient_bytes: tuple[float, float]


class _SimulatedExchange:
    """The exchange of one layer, forward or back, as operations of a rank."""

    def __init__(self, step: Step) -> None:
        self.step, self.size = step, sum(step.nodes)
        model = Model(step.load, step.nodes, step.constants)
        self.together = step.exchange.seconds(model, want_total=False) if self.size > 1 else 0.0
        self.apply_summary = model.apply_summary(alone=True)
        self.blocks = model.best_blocks() if step.name == "pipelined" else 1

    def _line(self, rank: int, reverse: bool) -> tuple[int, int]:
        """The rank's place in the line, and what is added to a rank to find the next one."""
        return (self.size - 1 - rank, -1) if reverse else (rank, 1)

    def begin(self, rank: int, key: object, reverse: bool) -> Program:
        place, way = self._line(rank, reverse)
        if self.size > 1 and self.step.name not in BY_MESSAGE:
            yield Join(key, self.together, "exchange")
        elif self.step.name == "doubling" and place + 1 < self.size:
            yield Send(rank + way, self.step.load.summary_bytes)

    def finish(self, rank: int, key: object, reverse: bool) -> Program:
        place, way = self._line(rank, reverse)
        if self.size == 1:
            return
        if self.step.name in ("ring", "pipelined"):
            for _ in range(self.blocks):
                if place > 0:
                    yield Receive(rank - way)
                if place < self.size - 1:
                    yield SimulatedWork(self.apply_summary / self.blocks)
                    yield Send(rank + way, self.step.load.state_bytes / self.blocks)
        elif self.step.name == "doubling":
            distance = 1
            while distance < self.size:
                if place >= distance:
                    yield Receive(rank - way * distance)
                    yield SimulatedWork(self.apply_summary)
                distance *= 2
                if distance < self.size and place + distance < self.size:
                    yield SimulatedWork(self.apply_summary)
                    yield Send(rank + way * distance, self.step.load.summary_bytes)
        else:
            yield Wait(key)


def program(step: Step) -> Callable[[int], Program]:
    """The step of every rank, for `simulate`."""
    exchange = _SimulatedExchange(step)

    def layer(rank: int, number: int, pieces: Pieces, reverse: bool) -> Program:
        key = ("backward" if reverse else "forward", number)
        yield SimulatedWork(pieces.before)
        yield from exchange.begin(rank, key, reverse)
        yield SimulatedWork(pieces.during)
        yield from exchange.finish(rank, key, reverse)
        yield SimulatedWork(pieces.after)

    def run(rank: int) -> Program:
        yield SimulatedWork(step.outside_forward)
        for number in range(step.layers):
            yield from layer(rank, number, step.forward, False)
        yield SimulatedWork(step.outside_backward)
        waiting, buckets = 0.0, 0
        for number in range(step.layers):
            yield from layer(rank, number, step.backward, True)
            waiting += step.gradient_bytes[0]
            if waiting >= BUCKET_BYTES:
                yield Join(("gradients", buckets), step.reduce_s(waiting), "gradients")
                waiting, buckets = 0.0, buckets + 1
        if exchange.size > 1:
            yield Join(("gradients", buckets), step.reduce_s(waiting + step.gradient_bytes[1]), "gradients")
            for bucket in range(buckets + 1):
                yield Wait(("gradients", bucket))
        yield SimulatedWork(step.optimizer)

    return run
