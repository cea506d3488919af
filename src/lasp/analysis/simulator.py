"""A discrete-event simulator: programs of many ranks on nodes with cores and links.

A program yields operations; the simulator answers when each ends. Devices of their own work side by side; ranks that
share the cores of a host share them equally. Messages between two ranks keep their order; a rank sends one after the
other. Collectives of one channel follow each other, as on a communication stream.

    Work(seconds)            on this rank's device or core, times the rank's slowness
    Send(to, nbytes)         returns at once
    Receive(source)          until the next message from there has come
    Join(key, seconds)       take part in a collective of all ranks, which ends that long after the last has joined
    Wait(key)                until it has ended
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lasp.exchange.cost import Link


class SimulatedWork(NamedTuple):
    seconds: float


class Send(NamedTuple):
    to: int
    nbytes: float


class Receive(NamedTuple):
    source: int


class Join(NamedTuple):
    key: object
    seconds: float
    channel: str = "collectives"


class Wait(NamedTuple):
    key: object


Operation = SimulatedWork | Send | Receive | Join | Wait
Program = Iterator[Operation]


class SimulatedMachine(NamedTuple):
    """Hosts that ranks run on, and the links between them.

    Attributes:
        nodes: how many consecutive ranks share a host, host after host.
        inside, across: of one message, in a host and between hosts.
        cores: cores of a host that its ranks share, possibly a fraction; None where each rank has its own device.
        slowness: factor of every rank's work, for stragglers; empty for 1.
    """

    nodes: tuple[int, ...]
    inside: Link
    across: Link
    cores: float | None = None
    slowness: tuple[float, ...] = ()


class _Host:
    """Cores shared equally by those that work."""

    def __init__(self, cores: float) -> None:
        self.cores, self.left, self.now, self.version = cores, dict[int, float](), 0.0, 0

    def rate(self) -> float:
        return min(1.0, self.cores / len(self.left)) if self.left else 1.0

    def advance(self, now: float) -> None:
        done = (now - self.now) * self.rate()
        for rank in self.left:
            self.left[rank] -= done
        self.now = now

    def next(self) -> tuple[float, int]:
        rank = min(self.left, key=lambda rank: (self.left[rank], rank))
        return self.now + max(0.0, self.left[rank]) / self.rate(), rank


class _Collective:
    def __init__(self) -> None:
        self.joined, self.end, self.waiting = 0, float("inf"), list[int]()


def simulate(
    machine: SimulatedMachine, programs: Sequence[Callable[[int], Program]] | Callable[[int], Program]
) -> list[float]:
    """The time at which each rank's program ends, in seconds from a common start.

    Args:
        programs: one for every rank, or one for all; called with the rank.

    Raises:
        RuntimeError: ranks wait for what never comes.
    """
    size = sum(machine.nodes)
    make = programs if callable(programs) else (lambda rank: programs[rank](rank))
    host_of = [host for host, count in enumerate(machine.nodes) for _ in range(count)]
    hosts = None if machine.cores is None else [_Host(machine.cores) for _ in machine.nodes]
    running = [make(rank) for rank in range(size)]
    ended = [-1.0] * size
    mail: dict[tuple[int, int], deque[float]] = {}
    listening: dict[tuple[int, int], float] = {}
    leaves = [0.0] * size
    collectives: dict[object, _Collective] = {}
    channels: dict[str, float] = {}
    events: list[tuple[float, int, str, int, int]] = []
    count = 0

    def at(time: float, kind: str, who: int, version: int = 0) -> None:
        nonlocal count
        count += 1
        heapq.heappush(events, (time, count, kind, who, version))

    def plan_host(host: int) -> None:
        assert hosts is not None
        hosts[host].version += 1
        if hosts[host].left:
            at(hosts[host].next()[0], "host", host, hosts[host].version)

    def work(rank: int, now: float, seconds: float) -> None:
        seconds *= machine.slowness[rank] if machine.slowness else 1.0
        if hosts is None:
            at(now + seconds, "resume", rank)
            return
        host = hosts[host_of[rank]]
        host.advance(now)
        host.left[rank] = seconds
        plan_host(host_of[rank])

    def resume(rank: int, now: float) -> None:
        while True:
            operation = next(running[rank], None)
            if operation is None:
                ended[rank] = now
                return
            if isinstance(operation, SimulatedWork):
                work(rank, now, operation.seconds)
                return
            if isinstance(operation, Send):
                link = machine.inside if host_of[rank] == host_of[operation.to] else machine.across
                start = max(now, leaves[rank])
                leaves[rank] = start + operation.nbytes / link.bytes_per_s
                comes, pair = leaves[rank] + link.latency_s, (rank, operation.to)
                if pair in listening:
                    at(max(comes, listening.pop(pair)), "resume", operation.to)
                else:
                    mail.setdefault(pair, deque()).append(comes)
            elif isinstance(operation, Receive):
                pair = (operation.source, rank)
                if mail.get(pair):
                    at(max(now, mail[pair].popleft()), "resume", rank)
                else:
                    listening[pair] = now
                return
            elif isinstance(operation, Join):
                collective = collectives.setdefault(operation.key, _Collective())
                collective.joined += 1
                if collective.joined == size:
                    collective.end = max(now, channels.get(operation.channel, 0.0)) + operation.seconds
                    channels[operation.channel] = collective.end
                    for waiter in collective.waiting:
                        at(collective.end, "resume", waiter)
            else:
                collective = collectives.setdefault(operation.key, _Collective())
                if collective.joined < size:
                    collective.waiting.append(rank)
                    return
                if collective.end > now:
                    at(collective.end, "resume", rank)
                    return

    for rank in range(size):
        at(0.0, "resume", rank)
    while events:
        now, _, kind, who, version = heapq.heappop(events)
        if kind == "resume":
            resume(who, now)
            continue
        assert hosts is not None
        host = hosts[who]
        if version != host.version:
            continue
        host.advance(now)
        _, rank = host.next()
        del host.left[rank]
        plan_host(who)
        resume(rank, now)
    stuck = [rank for rank, time in enumerate(ended) if time < 0]
    if stuck:
        raise RuntimeError(f"ranks {stuck[:8]} of {size} wait for what never comes")
    return ended
