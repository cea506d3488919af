"""Works of all ranks as CUDA graphs, whose replays cost the host one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.distributed.comm import Comm
from lasp.train.world import World

Work = Callable[[], Any]
"""Gives tensors, or None."""


class Captured(NamedTuple):
    """Called, it replays the graph."""

    graph: torch.cuda.CUDAGraph
    work: Work
    """Kept, because the graph reads its tensors where they lie."""

    def __call__(self) -> None:
        self.graph.replay()


class Refused(NamedTuple):
    reason: str


class Graphs:
    """Captures works. Every call is collective.

    All graphs share one pool of memory: they are replayed one after another, and nobody reads what an earlier one
    computed. They must be gone before the process group is: NCCL waits for graphs that hold its kernels.

    Args:
        comms: what the works send through.
        bound: relative errors of a replay's values from the work's own.
    """

    def __init__(self, world: World, comms: Sequence[Comm], bound: float) -> None:
        self._world, self._comms, self._bound = world, comms, bound
        self._stream, self._pool = torch.cuda.Stream(world.device), torch.cuda.graph_pool_handle()

    def capture(self, work: Work) -> Captured | Refused:
        """`work` as a graph, if that succeeds, and computes the same, on all ranks."""
        expected = self._warm_up(work)
        graph = torch.cuda.CUDAGraph()
        values, reason = self._captured(graph, work)
        # No rank may replay alone: its messages would wait for ever.
        if reason := self._agreed(reason):
            return Refused(reason)
        graph.replay()
        torch.cuda.synchronize(self._world.device)
        worst = largest_error(values or (), expected or ())
        if reason := self._agreed("" if worst < self._bound else f"a replay's values are off by {worst:.1e}"):
            return Refused(reason)
        return Captured(graph, work)

    def _warm_up(self, work: Work) -> tuple[Tensor, ...] | None:
        """The ranks agree on what they do, kernels are compiled and NCCL connects: the host cannot in a capture."""
        self._stream.wait_stream(torch.cuda.current_stream(self._world.device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                values = work()
            self._join_sends()
        torch.cuda.synchronize(self._world.device)
        return values

    def _captured(self, graph: torch.cuda.CUDAGraph, work: Work) -> tuple[tuple[Tensor, ...] | None, str]:
        """The tensors that the graph will fill, and why there is none."""
        try:
            # torch.cuda.graph leaves its stream the current one where the capture cannot be ended; the outer context
            # does not. NCCL's watchdog asks for events in a thread of its own: this thread's errors only.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                values = work()
                self._join_sends()
            return values, ""
        except Exception as error:  # of CUDA, NCCL or a compiler, each with a class of its own
            reason = _first_cause(error)
        for comm in self._comms:
            comm.abandon()
        # A pool stays marked as in use by a capture that was not ended; an error that no call has reported yet would
        # be the next one's.
        self._pool = torch.cuda.graph_pool_handle()
        try:
            torch.cuda.synchronize(self._world.device)
        except RuntimeError as error:
            reason += f"; then {error}"
        return None, reason

    def _join_sends(self) -> None:
        """Joins what a rank has sent without waiting, on NCCL's stream: a capture must join it before its end.

        Before a capture it leaves nothing behind whose event the next message would ask for, which is not allowed in a
        capture; after one, nothing whose event is the graph's.
        """
        for comm in self._comms:
            comm.flush()

    def _agreed(self, reason: str) -> str:
        """The reason why not, if one of the ranks has one."""
        failed = [rank for rank, row in enumerate(self._world.gather([float(bool(reason))])) if row[0]]
        return reason or (f"rank {failed[0]} could not" if failed else "")


def largest_error(values: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The largest ||value - reference|| / ||reference||, infinite for NaN; 0 of none."""
    errors = [
        ((value.double() - reference.double()).norm() / reference.double().norm()).item()
        for value, reference in zip(values, references, strict=True)
    ]
    # NaN is no error that max() would find.
    return max((float("inf") if error != error else error for error in errors), default=0.0)


def _first_cause(error: BaseException) -> str:
    """The first error that was raised: the end of a capture that went wrong raises too."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"[:200]
