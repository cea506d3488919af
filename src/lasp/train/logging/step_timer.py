"""Measures what a step cost one rank: its own work, its waits, its bytes, its memory.

    start ............ gradients of the first layer ............ gradients of all ranks summed
    |  own work, and waits in the exchange of states  |  waiting for the sum  |

On a GPU the points are CUDA events, read after the loss has been fetched, which waits for the device anyway.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.distributed.clock import ExchangeClock, Marks
from lasp.parallelize import ParallelModel


class RankStep(NamedTuple):
    """One rank's step. Seconds; on a GPU of its stream, else of the host.

    Attributes:
        own_s: forward and backward pass without the waits below; what a slow rank has more of.
        exposed_s: waiting for states of other ranks.
        hidden_s: own work while such a message was under way, at most.
        summing_s: from the end of the backward pass through the blocks until the gradients of all ranks are summed.
        sent_bytes: in the exchange of states.
        peak_memory_bytes: since the process started; of the device's allocations on a GPU, else of the process.
    """

    own_s: float
    exposed_s: float
    hidden_s: float
    summing_s: float
    sent_bytes: float
    peak_memory_bytes: float


class StepTimer:
    """Measures a model's steps on this rank."""

    def __init__(self, model: ParallelModel, device: torch.device) -> None:
        self._comm = None if model.sp is None else model.sp.comm
        self._device = device
        self._marks = Marks(on_device=device.type == "cuda")
        self._start: Any = None
        self._back: Any = None
        self._end: Any = None
        self._clock: ExchangeClock | None = None
        self._sent_before = 0
        # The embedding is what a backward pass comes to last, after every block.
        model.module.get_submodule("embedding").register_forward_hook(self._watch_embedded)

    def start(self) -> None:
        self._sent_before, self._back = self._sent(), None
        if self._comm is not None:
            self._clock = self._comm.start_clock()
        self._start = self._marks.now()

    def backward_ended(self) -> None:
        """The gradients of all ranks are summed."""
        self._end = self._marks.now()
        if self._comm is not None:
            self._comm.clock = None

    def read(self) -> RankStep:
        """Measurements of the step that ended. On a GPU, once its work has."""
        exposed, hidden = (0.0, 0.0) if self._clock is None else self._clock.read()
        back = self._end if self._back is None else self._back
        passes = self._marks.seconds(self._start, back)
        return RankStep(
            own_s=max(0.0, passes - exposed),
            exposed_s=exposed,
            hidden_s=hidden,
            summing_s=self._marks.seconds(back, self._end),
            sent_bytes=self._sent() - self._sent_before,
            peak_memory_bytes=peak_memory(self._device),
        )

    def _watch_embedded(self, _module: object, _inputs: object, embedded: Tensor) -> None:
        if embedded.requires_grad:
            embedded.register_hook(self._came_back)

    def _came_back(self, _gradient: Tensor) -> None:
        self._back = self._marks.now()

    def _sent(self) -> int:
        return 0 if self._comm is None else self._comm.counters.sent_bytes


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that this process had allocated on a GPU, or had in memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():  # the other figure counts a parent's memory from before this program was loaded
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(largest if sys.platform == "darwin" else largest * 1024)
