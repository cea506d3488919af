"""Ranks in one process, for the combinatorial tests: `run(size, function)` calls `function(comm)` once a rank.

Each rank is a thread, but only one runs at a time; it runs until it has to wait for a message that is not there.
Which rank runs next is drawn from a seed, so every order of events can be tried and every failure repeats. When no
rank can run, that is a deadlock and fails at once. Messages between two ranks keep their order, as in gloo and NCCL;
a message taken for one of another size is an error, which gloo would not notice.

`comm.time` is when a rank is where it is: an ideal network takes `duration(kind, bytes)` for each operation, one
message at a time between two ranks. By default all take 1, so that the clock counts rounds.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import lasp
from lasp.distributed.comm import Counters
from lasp.sequence import sequence_parallel as module


class DeadlockError(AssertionError):
    """Every rank waits."""


class World:
    """The messages under way and whose turn it is."""

    def __init__(self, size: int, seed: int, duration: Callable[[str, int], float] | None) -> None:
        self.size, self.random = size, random.Random(seed)
        self.timed, self.duration = duration is not None, duration or (lambda kind, nbytes: 1)
        self.free: dict[tuple, float] = defaultdict(float)
        self.turn = [threading.Semaphore(0) for _ in range(size)]
        self.waiting: list[Callable[[], bool] | None] = [lambda: True] * size
        self.alive = set(range(size))
        self.queues: dict[tuple, deque] = defaultdict(deque)
        self.failure: BaseException | None = None

    def next(self) -> None:
        """Let a rank run that can; with a failure all do, to end."""
        runnable = [rank for rank in sorted(self.alive) if self.failure or self.waiting[rank]()]
        if runnable:
            self.turn[self.random.choice(runnable)].release()
        elif self.alive:
            self.failure = DeadlockError(f"ranks {sorted(self.alive)} of {self.size} all wait")
            self.next()

    def wait(self, rank: int, ready: Callable[[], bool]) -> None:
        self.waiting[rank] = ready
        self.next()
        self.turn[rank].acquire()
        if self.failure is not None:
            raise self.failure


class Pending:
    def __init__(self, world: World, rank: int, ready: Callable[[], bool], result: Callable[[], Any]) -> None:
        self._world, self._rank, self._ready, self._result = world, rank, ready, result

    def wait(self) -> Any:
        self._world.wait(self._rank, self._ready)
        return self._result()


class SimulatedComm:
    """Looks like `lasp.distributed.Comm`."""

    backend = "gloo"

    def __init__(self, world: World, rank: int, nodes: tuple[int, ...] | None) -> None:
        self._world, self.rank, self.size = world, rank, world.size
        self.nodes = nodes or (world.size,)
        self.counters = Counters()
        self.time = 0.0
        self.clock = None  # nobody measures waits here
        self._posted: dict[int, int] = defaultdict(int)
        self._collectives = 0

    def send(self, tensor, to):
        assert to != self.rank and 0 <= to < self.size
        self.counters.add(sent=tensor.nbytes)
        link = "message", self.rank, to
        duration = self._world.duration("message", tensor.nbytes)
        # Counting rounds, messages that do not wait for another are in one.
        start = max(self.time, self._world.free[link])
        self._world.free[link] = start + (duration if self._world.timed else 0)
        self._put(link, tensor, start + duration)

    def wait_for_sends(self):
        """Returns at once: sends wait on CUDA streams only."""

    def receive(self, like, source):
        """Receives of one source are served in the order in which they were posted."""
        assert source != self.rank and 0 <= source < self.size
        self.counters.add(received=like.nbytes)
        queue = self._world.queues["message", source, self.rank]
        index = self._posted[source]
        self._posted[source] += 1

        def result():
            message, arrival = queue[index]
            self.time = max(self.time, arrival)
            assert message.shape == like.shape and message.dtype == like.dtype, (message.shape, like.shape)
            return message

        return Pending(self._world, self.rank, lambda: len(queue) > index, result)

    def batch_send_recv(self, sends, receives):
        for tensor, to in sends:
            self.send(tensor, to)
        return [self.receive(like, source) for like, source in receives]

    def all_gather(self, tensor):
        others = tensor.nbytes * (self.size - 1)
        self.counters.add(sent=others, received=others)
        return self._collective("gather", others, tensor, lambda parts: torch.stack(parts))

    def all_to_all(self, parts, sizes):
        assert len(parts) == len(sizes) == self.size
        own = [part.reshape(-1) for part in parts]
        received = sum(n for rank, n in enumerate(sizes) if rank != self.rank) * parts[0].element_size()
        self.counters.add(
            sent=sum(part.nbytes for rank, part in enumerate(own) if rank != self.rank), received=received
        )

        def pick(everything):
            mine = [theirs[self.rank] for theirs in everything]
            for rank, part in enumerate(mine):
                assert rank == self.rank or part.numel() == sizes[rank], (rank, part.numel(), sizes)
            return mine

        return self._collective("swap", received, own, pick)

    def broadcast(self, tensor, source):
        if self.rank == source:
            self.counters.add(sent=tensor.nbytes * (self.size - 1))
        else:
            self.counters.add(received=tensor.nbytes)
        return self._collective("broadcast", tensor.nbytes, tensor, lambda tensors: tensors[source]).wait()

    def sum(self, tensor):
        return self._collective("gather", 0, tensor, lambda tensors: sum(tensors[1:], tensors[0])).wait()

    def begin(self, *_description, **_options):
        """Ranks that run one program: none need be told which call its messages belong to."""
        return self

    def adjoint(self, *_part):
        return self

    def check(self):
        return self

    @property
    def comm(self):
        return self

    def _put(self, key, tensor, arrival):
        """A copy, as a network makes one: what the sender does to its tensor afterwards is not seen."""
        copy = [t.detach().clone() for t in tensor] if isinstance(tensor, list) else tensor.detach().clone()
        self._world.queues[key].append((copy, arrival))

    def _collective(self, kind, nbytes, own, result):
        key = self._collectives
        self._collectives += 1
        self._put((key, self.rank), own, self.time + self._world.duration(kind, nbytes))
        queues = [self._world.queues[key, rank] for rank in range(self.size)]

        def everything():
            self.time = max(self.time, *(queue[0][1] for queue in queues))
            return result([queue[0][0] for queue in queues])

        return Pending(self._world, self.rank, lambda: all(queues), everything)


def run(
    size: int,
    function: Callable[[SimulatedComm], Any],
    *,
    seed: int = 0,
    nodes: tuple[int, ...] | None = None,
    duration: Callable[[str, int], float] | None = None,
) -> list[Any]:
    """`function(comm)` on every rank; the results in rank order. The first error of any rank is raised."""
    world = World(size, seed, duration)
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        world.turn[rank].acquire()
        try:
            # Backward passes on a GPU share one thread of autograd, which a rank that waits would keep from the others.
            with torch.autograd.set_multithreading_enabled(False):
                if world.failure is None:
                    results[rank] = function(SimulatedComm(world, rank, nodes))
        except BaseException as error:
            world.failure = world.failure or error
        finally:
            world.alive.discard(rank)
            world.next()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    world.next()
    for thread in threads:
        thread.join(180)  # on a GPU the first compiles kernels
        assert not thread.is_alive(), "a rank does not end"
    if world.failure is not None:
        raise world.failure
    return results


def sequence_parallel(comm: SimulatedComm, exchange: Any, lengths: tuple[int, ...]) -> lasp.SequenceParallel:
    """A SequenceParallel over simulated ranks."""
    same: dict[str, Any] = {
        "Comm": lambda group, timeout_s: group,
        "Calls": lambda comm: comm,
        "_process_group": lambda group: group,
    }
    with mock.patch.multiple(module, **same):
        return lasp.SequenceParallel(comm, lengths=lengths, exchange=exchange)  # type: ignore[arg-type]
