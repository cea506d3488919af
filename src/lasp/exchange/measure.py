"""Times on a group of ranks: the elementary operations, for the model's constants, and whole exchanges.

A measurement repeats: all ranks meet, each runs the work and takes its time; the slowest rank's time counts. Work
goes forward and back, as training does, so that no rank can run ahead of the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.algebra import Dense, Diagonal, Identity, Scalar, Summary, Transition
from lasp.distributed.call import Line
from lasp.distributed.comm import Comm
from lasp.exchange.base import Exchange
from lasp.exchange.cost import Constants, Link
from lasp.exchange.payload import Payload
from lasp.exchange.peer.exchange import Peer
from lasp.exchange.peer.exchange import is_possible as peers_are_possible

# Bytes that a rank receives in one elementary operation, where not given.
PROBES = (4 << 10, 64 << 10, 512 << 10, 4 << 20)


class Timing(NamedTuple):
    """Seconds of one forward or backward exchange: the median over repetitions, and the quartiles."""

    median: float
    low: float
    high: float


def timings(
    comm: Comm, works: Sequence[Callable[[], object]], device: torch.device, repetitions: int, *, warmup: int = 2
) -> list[Timing]:
    """The times of several works, which take turns, so that a slow moment of the machine falls on all of them.

    Each turn has an order of its own, and a work runs once more before its time is taken: what follows light work finds
    a processor that has cooled and clocks higher.
    """
    order = torch.Generator().manual_seed(0)
    token = torch.zeros(1, device=device)
    seconds = torch.zeros(repetitions, len(works), dtype=torch.float64)
    for repetition in range(-warmup, repetitions):
        for index in torch.randperm(len(works), generator=order).tolist():
            if repetition >= 0:
                works[index]()
            comm.all_gather(token).wait()
            _finish(device)
            start = time.perf_counter()
            works[index]()
            _finish(device)
            if repetition >= 0:
                seconds[repetition, index] = time.perf_counter() - start
    gathered = comm.all_gather(seconds.to(device=device).view(-1)).wait().cpu()
    slowest = gathered.view(comm.size, repetitions, len(works)).amax(0)
    result = []
    for column in slowest.unbind(1):
        low, median, high = torch.quantile(column, torch.tensor([0.25, 0.5, 0.75], dtype=column.dtype)).tolist()
        result.append(Timing(median, low, high))
    return result


def exchange_work(comm: Comm, exchange: Exchange, load: Payload, device: torch.device) -> Callable[[], object]:
    """An exchange forward, then one back; half of its time is an exchange's."""
    summary, initial = random_summary(load, comm.rank, device)

    def work() -> None:
        for reverse in (False, True):
            exchange.begin(comm, summary, initial, reverse=reverse, want_total=False).wait()

    return work


def random_summary(load: Payload, seed: int, device: torch.device) -> tuple[Summary, Tensor]:
    """A summary of a load's sizes, and an initial state."""
    random = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if load.itemsize == 8 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(load.heads, *shape, generator=random, dtype=dtype).to(device)

    transitions: dict[int, Callable[[], Transition]] = {
        0: lambda: Identity(),
        1: lambda: Scalar(-0.1 * normal().abs()),
        load.keys: lambda: Diagonal(-0.1 * normal(load.keys).abs()),
        load.keys**2: lambda: Dense(normal(load.keys, load.keys) / load.keys),
    }
    state = normal(load.keys, load.values)
    return Summary(transitions[load.transition](), state), torch.zeros_like(state)


class Operations(NamedTuple):
    """Times of the elementary operations on a group of ranks.

    Attributes:
        sizes: bytes that a rank receives in one.
        times: of one operation of every size, by the name that it has in `Constants`.
        flops_per_s: of matrix products.
        source: where the numbers come from.
    """

    sizes: tuple[int, ...]
    times: dict[str, list[Timing]]
    flops_per_s: float
    source: str

    def links(self) -> dict[str, Link]:
        """A latency and a bandwidth for each, of lower quartiles: whatever else a machine does only adds time."""
        return {name: fit(self.sizes, [timing.low for timing in times]) for name, times in self.times.items()}

    def constants(self) -> Constants:
        """One host is assumed to be all there is: `across` is what a message costs in the group's ring."""
        links = self.links()
        return Constants(**links, across=links["message"], flops_per_s=self.flops_per_s, source=self.source)


class _Probes:
    """The elementary operations on payloads of a rank."""

    def __init__(self, comm: Comm) -> None:
        self._comm, self._others = comm, comm.size - 1

    def chain(self, payload: Tensor) -> None:
        for reverse in (False, True):
            line = Line(self._comm, reverse)
            if line.position > 0:
                self._comm.receive(payload, line.rank(line.position - 1)).wait()
            if line.position < self._others:
                self._comm.send(payload, line.rank(line.position + 1))

    def shift(self, payload: Tensor) -> None:
        for reverse in (False, True):
            line = Line(self._comm, reverse)
            sends = [(payload, line.rank(line.position + 1))] if line.position < self._others else []
            receives = [(payload, line.rank(line.position - 1))] if line.position > 0 else []
            for message in self._comm.batch_send_recv(sends, receives):
                message.wait()

    def gather(self, part: Tensor) -> None:
        self._comm.all_gather(part).wait()

    def all_to_all(self, part: Tensor) -> None:
        self._comm.all_to_all([part] * self._comm.size, [part.numel()] * self._comm.size).wait()

    def broadcast(self, payload: Tensor) -> None:
        self._comm.broadcast(payload, 0)

    def peer(self, payload: Tensor) -> None:
        summary = Summary(Identity(), payload.view(1, 1, -1))
        Peer().begin(self._comm, summary, None, reverse=False, want_total=False).wait()


def _apply_summary(payload: Tensor) -> None:
    Summary(Scalar(payload[:1]), payload.view(1, 1, -1)).apply(payload.view(1, 1, -1))


def operations(
    comm: Comm, device: torch.device, *, sizes: tuple[int, ...] = PROBES, repetitions: int = 40
) -> Operations:
    """The times on a group of at least two ranks, the same on all. Takes seconds."""
    size, others = comm.size, comm.size - 1
    do = _Probes(comm)

    def nothing(payload: Tensor) -> None:
        pass

    # Name, the work on a payload, which part of the received bytes that is, and how many operations in a row it is.
    probes: dict[str, tuple[Callable[[Tensor], object], int, int]] = {
        "message": (do.chain, 1, 2 * others),
        "shift": (do.shift, 1, 2),
        "gather": (do.gather, others, 1),
        "all_to_all": (do.all_to_all, others, 1),
        "broadcast": (do.broadcast, 1, 1),
        "apply_summary": (_apply_summary, 1, 1),
        "apply_summary_alone": (_apply_summary if comm.rank == 0 else nothing, 1, 1),
    }
    if peers_are_possible(comm, max(sizes) // others, device):
        probes["peer"] = (do.peer, others, 1)
    works = [
        _bound(work, torch.zeros(max(1, int(n / part / 4)), device=device))
        for work, part, _ in probes.values()
        for n in sizes
    ]
    edge = 128
    matrix = torch.zeros(16, edge, edge, device=device)
    *timed, products = timings(comm, [*works, _bound(torch.matmul, matrix, matrix)], device, repetitions)
    times: dict[str, list[Timing]] = {}
    for index, (name, (_, _, count)) in enumerate(probes.items()):
        own = timed[index * len(sizes) : (index + 1) * len(sizes)]
        times[name] = [Timing(*(seconds / count for seconds in timing)) for timing in own]
    source = f"measured on {size} ranks over {comm.backend} on {device.type}"
    return Operations(sizes, times, 2 * 16 * edge**3 / products.low, source)


def fit(nbytes: Sequence[int], seconds: Sequence[float]) -> Link:
    """Latency and bandwidth with the least sum of squared relative errors, both positive."""
    weights = [1 / s for s in seconds]
    rows = torch.tensor([[w, w * n] for w, n in zip(weights, nbytes, strict=True)], dtype=torch.float64)
    latency, per_byte = torch.linalg.lstsq(rows, torch.ones(len(seconds), 1, dtype=torch.float64)).solution.flatten()
    if per_byte <= 0:
        return Link(statistics.fmean(seconds), 1e15)
    if latency < 0:
        ratios = [n / s for n, s in zip(nbytes, seconds, strict=True)]
        return Link(0.0, statistics.median(ratios))
    return Link(float(latency), float(1 / per_byte))


def _bound(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
