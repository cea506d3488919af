"""Runs cases in processes of their own, and says what came of each.

A crew is one process, or where a case asks for real ranks as many as those, which stay joined over gloo from case to
case. A crew of which a process dies, does not answer in time, or raises, is replaced.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .cases import MAX_REAL_RANKS, Case, Problem, draw, make
from .compare import findings
from .solve import Results, joined, library

# For a case: a GPU may have dozens of kernels to compile first.
CASE_S = {"cpu": 150.0, "cuda": 400.0}
# For cases still running when no more are begun.
GRACE_S = 20.0
# For a message between ranks.
TIMEOUT_S = 60.0


class Draw(NamedTuple):
    """Ranges that a case is drawn from."""

    seed: int
    index: int  # type: ignore[assignment]
    device: str
    family: str

    @property
    def case(self) -> Case:
        return draw(self.seed, self.index, self.device, self.family)

    def __str__(self) -> str:
        family = "" if self.family == "all" else f" --family {self.family}"
        return f"python -m tests.fuzz --device {self.device}{family} --case {self.seed}:{self.index}"


class Outcome(NamedTuple):
    """Outcome of a case: what was found, nothing if all is well, None if it was not waited for."""

    draw: Draw
    found: list[str] | None
    seconds: float


class Ranks:
    """This process's place in a world of as many ranks as a case may have, and the groups of fewer."""

    def __init__(self, rank: int, store: str) -> None:
        import lasp

        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=MAX_REAL_RANKS,
            timeout=timedelta(seconds=TIMEOUT_S),
        )  # fmt: skip
        self.rank, self._control, self._sp = rank, {}, {}
        for size in range(MAX_REAL_RANKS, 1, -1):
            groups: list[Any] = [dist.new_group(list(range(size))) for _ in range(2)]  # a number elsewhere
            self._control[size], group = groups
            if rank < size:
                self._sp[size] = lasp.SequenceParallel(group, timeout_s=TIMEOUT_S)

    def solve(self, case: Case, problem: Problem) -> Results | None:
        """All ranks' results as one device's, on the first; the others give theirs to it."""
        from lasp.exchange import resolve

        size, error, local = case.real_ranks, "", None
        try:
            sp = self._sp[size].with_lengths(None if case.even else case.lengths)
            sp.exchange = resolve(case.schedule, size)
            local = library(case, problem, sp)
        except Exception:
            error = f"rank {self.rank} of {size}: {traceback.format_exc()}"
        gathered: list[Any] | None = [None] * size if self.rank == 0 else None
        dist.gather_object((error, local), gathered, dst=0, group=self._control[size])
        if gathered is None:
            return None
        errors = [error for error, _ in gathered if error]
        if errors:
            raise RuntimeError("\n".join(errors))
        return joined(case, [local for _, local in gathered])


def solve_simulated(case: Case, problem: Problem) -> Results:
    """Solves on ranks in this process, one at a time."""
    from exchange.simulated import run, sequence_parallel

    from lasp.exchange import resolve

    size = len(case.lengths or ())

    def work(comm: Any) -> Results:
        sp = sequence_parallel(comm, resolve(case.schedule, size), case.lengths)
        return library(case, problem, sp.with_lengths(None) if case.even else sp)

    return joined(case, run(size, work, seed=case.seed))


def check(case: Case, device: torch.device, ranks: Ranks | None) -> list[str]:
    """Returns what is found in a case; on other ranks than the first nothing."""
    problem = make(case, device)
    with torch.set_grad_enabled(case.learned != "nothing"):
        if case.lengths is None:
            values: Results | None = library(case, problem)
        elif case.simulated:
            values = solve_simulated(case, problem)
        else:
            assert ranks is not None
            values = ranks.solve(case, problem)
    return [] if values is None else [str(each) for each in findings(case, problem, values)]


def _work(rank: int, device: str, pipe: Any) -> None:
    """Runs in a process of a crew."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # is the first process's to take
    try:
        _serve(rank, device, pipe)
    except EOFError:
        os._exit(0)  # nobody asks any more
    except BaseException:
        pipe.send(([f"process {rank}: {traceback.format_exc()}"], True))
        os._exit(1)


def _serve(rank: int, device: str, pipe: Any) -> None:
    torch.set_num_threads(1)  # first: what a fork inherits of OpenMP hangs
    if device == "cpu":
        _prepare_interpreter()
    warnings.simplefilter("ignore")
    # Memory nobody wrote is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    ranks = None
    while True:
        message = pipe.recv()
        if isinstance(message, str):
            ranks = Ranks(rank, message)
            continue
        faulthandler.dump_traceback_later(0.9 * CASE_S[device], file=sys.__stderr__)
        try:
            answer, broken = check(message.case, torch.device(device), ranks), False
        except Exception:
            answer, broken = [traceback.format_exc()], True
        faulthandler.cancel_dump_traceback_later()
        if device == "cuda":
            broken = broken or not _device_works()
            torch.cuda.empty_cache()
        if rank == 0:
            pipe.send((answer, broken))


def _device_works() -> bool:
    """A fault on a GPU stays with its process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _prepare_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, as much of PyTorch does
    import interpreted_bf16
    import interpreted_fast

    interpreted_bf16.install()
    interpreted_fast.install()


class Crew:
    """Processes for one case at a time."""

    def __init__(self, device: str) -> None:
        self._device = device
        # On a CPU forked, which takes no time; CUDA does not survive that.
        self._context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._draw: Draw | None = None
        self._since = 0.0
        self._add()

    def _add(self) -> None:
        ours, theirs = self._context.Pipe()
        arguments = (len(self._processes), self._device, theirs)
        process = self._context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        self._pipes.append(ours)
        self._processes.append(process)

    def begin(self, of: Draw) -> None:
        self._draw, self._since = of, time.monotonic()
        size = of.case.real_ranks
        if size > 1 and self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            while len(self._processes) < MAX_REAL_RANKS:
                self._add()
            for pipe in self._pipes:
                pipe.send(os.path.join(self._folder.name, "store"))
        for pipe in self._pipes[:size]:
            pipe.send(of)

    @property
    def is_idle(self) -> bool:
        return self._draw is None

    @property
    def events(self) -> list[Any]:
        """Pipes and ends to wait for."""
        return [self._pipes[0], *(process.sentinel for process in self._processes)]

    def outcome(self) -> tuple[Outcome | None, bool]:
        """Returns what has come of the case, if anything has, and whether the crew can go on."""
        assert self._draw is not None
        seconds = time.monotonic() - self._since
        found, goes_on = None, False
        for pipe in self._pipes:  # only the first tells, but for what ends a process
            with contextlib.suppress(EOFError, OSError):
                if found is None and pipe.poll():
                    found, broken = pipe.recv()
                    goes_on = not broken
        dead = [(rank, process.exitcode) for rank, process in enumerate(self._processes) if not process.is_alive()]
        if found is None and dead:
            found = [f"process {rank} died with exit code {code}" for rank, code in dead]
        elif found is None and seconds > CASE_S[self._device]:
            found = [f"no answer within {CASE_S[self._device]:.0f} s"]
        if found is None:
            return None, True
        of, self._draw = self._draw, None
        return Outcome(of, found, seconds), goes_on and not dead

    def unfinished(self) -> Outcome:
        assert self._draw is not None
        return Outcome(self._draw, None, time.monotonic() - self._since)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()


def run(draws: Iterator[Draw], device: str, processes: int, deadline: Callable[[], bool]) -> Iterator[Outcome]:
    """The outcomes of cases, as they come, until `deadline()`; those begun by then are waited for, but not for long."""
    crews: list[Crew] = []
    left: Iterator[Draw] | None = draws
    waits_until = float("inf")
    try:
        while True:
            if left is not None and deadline():
                left, waits_until = None, time.monotonic() + GRACE_S
            idle = [crew for crew in crews if crew.is_idle]
            while left is not None and (idle or len(crews) < processes):
                following = next(left, None)
                if following is None:
                    left = None
                    break
                if not idle:
                    crews.append(Crew(device))
                    idle.append(crews[-1])
                idle.pop().begin(following)
            busy = [crew for crew in crews if not crew.is_idle]
            if time.monotonic() > waits_until:
                yield from (crew.unfinished() for crew in busy)
                return
            if not busy:
                return
            wait([event for crew in busy for event in crew.events], timeout=1.0)
            for crew in busy:
                outcome, goes_on = crew.outcome()
                if outcome is None:
                    continue
                if not goes_on:
                    crew.end()
                    crews.remove(crew)
                yield outcome
    finally:
        for crew in crews:
            crew.end()
