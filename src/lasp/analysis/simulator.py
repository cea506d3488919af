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


class _Simulation:
    """Events in their order, and what they leave behind: messages on their way, collectives, ends."""

    def __init__(self, machine: SimulatedMachine, running: list[Program]) -> None:
        self.machine, self.running, self.ended = machine, running, [-1.0] * len(running)
        self._host_of = [host for host, count in enumerate(machine.nodes) for _ in range(count)]
        self._hosts = None if machine.cores is None else [_Host(machine.cores) for _ in machine.nodes]
        self._mail: dict[tuple[int, int], deque[float]] = {}
        self._listening: set[tuple[int, int]] = set()
        self._leaves = [0.0] * len(running)
        self._collectives: dict[object, _Collective] = {}
        self._channels: dict[str, float] = {}
        self._events: list[tuple[float, int, str, int, int]] = []
        self._count = 0

    def run(self) -> None:
        for rank in range(len(self.running)):
            self._at(0.0, "resume", rank)
        while self._events:
            now, _, kind, who, version = heapq.heappop(self._events)
            if kind == "resume":
                self._resume(who, now)
            else:
                self._work_ends(who, now, version)

    def _at(self, time: float, kind: str, who: int, version: int = 0) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, kind, who, version))

    def _resume(self, rank: int, now: float) -> None:
        """Goes through a rank's operations up to one that it waits for."""
        goes_on = True
        while goes_on:
            operation = next(self.running[rank], None)
            if operation is None:
                self.ended[rank] = now
                return
            if isinstance(operation, SimulatedWork):
                goes_on = self._work(rank, now, operation.seconds)
            elif isinstance(operation, Send):
                goes_on = self._send(rank, now, operation)
            elif isinstance(operation, Receive):
                goes_on = self._receive(rank, now, operation.source)
            elif isinstance(operation, Join):
                goes_on = self._join(now, operation)
            else:
                goes_on = self._wait(rank, now, operation.key)

    # Operations. Each says whether the rank goes on at once.

    def _work(self, rank: int, now: float, seconds: float) -> bool:
        seconds *= self.machine.slowness[rank] if self.machine.slowness else 1.0
        if self._hosts is None:
            self._at(now + seconds, "resume", rank)
        else:
            host = self._hosts[self._host_of[rank]]
            host.advance(now)
            host.left[rank] = seconds
            self._plan_host(self._host_of[rank])
        return False

    def _send(self, rank: int, now: float, message: Send) -> bool:
        in_a_host = self._host_of[rank] == self._host_of[message.to]
        link = self.machine.inside if in_a_host else self.machine.across
        self._leaves[rank] = max(now, self._leaves[rank]) + message.nbytes / link.bytes_per_s
        comes, pair = self._leaves[rank] + link.latency_s, (rank, message.to)
        if pair in self._listening:
            self._listening.remove(pair)
            self._at(comes, "resume", message.to)
        else:
            self._mail.setdefault(pair, deque()).append(comes)
        return True

    def _receive(self, rank: int, now: float, source: int) -> bool:
        pair = (source, rank)
        if self._mail.get(pair):
            self._at(max(now, self._mail[pair].popleft()), "resume", rank)
        else:
            self._listening.add(pair)
        return False

    def _join(self, now: float, operation: Join) -> bool:
        collective = self._collectives.setdefault(operation.key, _Collective())
        collective.joined += 1
        if collective.joined == len(self.running):
            collective.end = max(now, self._channels.get(operation.channel, 0.0)) + operation.seconds
            self._channels[operation.channel] = collective.end
            for waiter in collective.waiting:
                self._at(collective.end, "resume", waiter)
        return True

    def _wait(self, rank: int, now: float, key: object) -> bool:
        collective = self._collectives.setdefault(key, _Collective())
        if collective.joined < len(self.running):
            collective.waiting.append(rank)
            return False
        if collective.end > now:
            self._at(collective.end, "resume", rank)
            return False
        return True

    # Hosts whose ranks share cores.

    def _plan_host(self, number: int) -> None:
        assert self._hosts is not None
        host = self._hosts[number]
        host.version += 1
        if host.left:
            self._at(host.next()[0], "host", number, host.version)

    def _work_ends(self, number: int, now: float, version: int) -> None:
        assert self._hosts is not None
        host = self._hosts[number]
        if version != host.version:  # planned anew since
            return
        host.advance(now)
        _, rank = host.next()
        del host.left[rank]
        self._plan_host(number)
        self._resume(rank, now)


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
    simulation = _Simulation(machine, [make(rank) for rank in range(size)])
    simulation.run()
    stuck = [rank for rank, time in enumerate(simulation.ended) if time < 0]
    if stuck:
        raise RuntimeError(f"ranks {stuck[:8]} of {size} wait for what never comes")
    return simulation.ended
