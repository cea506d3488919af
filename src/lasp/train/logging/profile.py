"""A trace of chosen steps, one file a rank, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import gc
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lasp import files
from lasp.errors import ConfigError


def parse_range(text: str) -> tuple[int, int]:
    """ "3:5": steps 3 to 5, the first step of a run being 1. Raises ConfigError."""
    first, separator, last = text.partition(":")
    if not (separator and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"--profile-steps must be FIRST:LAST with 1 <= FIRST <= LAST, such as 3:5; got {text!r}")
    return int(first), int(last)


class Profiler:
    """Traces steps first to last into `folder`/rank-N.json.gz; without a range it does nothing."""

    def __init__(
        self,
        steps: str | None,
        folder: Path,
        *,
        rank: int,
        device: torch.device,
        attempt: Callable[[str, Callable[[], object]], bool],
    ) -> None:
        """attempt: does what writes a file, and reports it if that fails (lasp.train.logging.output)."""
        self._range = None if steps is None else parse_range(steps)
        self._file = folder / f"rank-{rank}.json.gz"
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._running: profile | None = None
        self._attempt = attempt

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`, from 1."""
        if self._range is None:
            yield
            return
        first, last = self._range
        if number == first:
            self._running = profile(activities=self._activities)
            self._running.start()
        if self._running is None:  # a run that was continued past the first step to trace
            yield
            return
        with torch.profiler.record_function(f"step {number}"):
            yield
        if number == last:
            self.close()

    def close(self) -> None:
        """Write what was traced, if a trace is running."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        self._attempt("the trace", partial(self._write, running))
        del running
        # What PyTorch's profiler recorded sits in a cycle, and freeing it later, from another thread or at the end of
        # the program, crashes (2.13).
        gc.collect()

    def _write(self, trace: profile) -> None:
        files.make_folder(self._file.parent)
        # PyTorch compresses what ends in .gz.
        temporary = self._file.with_name(f".{uuid.uuid4().hex[:8]}-{self._file.name}")
        trace.export_chrome_trace(str(temporary))
        os.replace(temporary, self._file)
