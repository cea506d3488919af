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


def program(step: Step) -> Callable[[int], Program]:
    """The step of every rank, for `simulate`."""
    size = sum(step.nodes)
    model = Model(step.load, step.nodes, step.constants)
    together = step.exchange.seconds(model, want_total=False) if size > 1 else 0.0
    fold, blocks = model.apply_summary(alone=True), model.best_blocks() if step.name == "pipelined" else 1

    def begin(rank: int, key: object, reverse: bool) -> Program:
        place = size - 1 - rank if reverse else rank
        if size > 1 and step.name not in BY_MESSAGE:
            yield Join(key, together, "exchange")
        elif step.name == "doubling" and place + 1 < size:
            yield Send(rank - 1 if reverse else rank + 1, step.load.summary_bytes)

    def finish(rank: int, key: object, reverse: bool) -> Program:
        place, way = (size - 1 - rank, -1) if reverse else (rank, 1)
        if size == 1:
            return
        if step.name in ("ring", "pipelined"):
            for _ in range(blocks):
                if place > 0:
                    yield Receive(rank - way)
                if place < size - 1:
                    yield SimulatedWork(fold / blocks)
                    yield Send(rank + way, step.load.state_bytes / blocks)
        elif step.name == "doubling":
            distance = 1
            while distance < size:
                if place >= distance:
                    yield Receive(rank - way * distance)
                    yield SimulatedWork(fold)
                distance *= 2
                if distance < size and place + distance < size:
                    yield SimulatedWork(fold)
                    yield Send(rank + way * distance, step.load.summary_bytes)
        else:
            yield Wait(key)

    def run(rank: int) -> Program:
        yield SimulatedWork(step.outside_forward)
        for layer in range(step.layers):
            yield SimulatedWork(step.forward.before)
            yield from begin(rank, ("forward", layer), False)
            yield SimulatedWork(step.forward.during)
            yield from finish(rank, ("forward", layer), False)
            yield SimulatedWork(step.forward.after)
        yield SimulatedWork(step.outside_backward)
        waiting, buckets = 0.0, 0
        for layer in range(step.layers):
            yield SimulatedWork(step.backward.before)
            yield from begin(rank, ("backward", layer), True)
            yield SimulatedWork(step.backward.during)
            yield from finish(rank, ("backward", layer), True)
            yield SimulatedWork(step.backward.after)
            waiting += step.gradient_bytes[0]
            if waiting >= BUCKET_BYTES:
                yield Join(("gradients", buckets), step.reduce_s(waiting), "gradients")
                waiting, buckets = 0.0, buckets + 1
        if size > 1:
            yield Join(("gradients", buckets), step.reduce_s(waiting + step.gradient_bytes[1]), "gradients")
            for bucket in range(buckets + 1):
                yield Wait(("gradients", bucket))
        yield SimulatedWork(step.optimizer)

    return run
