"""Measures a rank's time while messages are under way: waiting for them, or working on something else.

Over NCCL the host does not wait, the GPU's stream does. There the marks are CUDA events in that stream, read once the
step has ended: nothing is synchronised for the sake of the clock.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch


class ExchangeTime(NamedTuple):
    """Seconds of one rank. Together they are the time in which some message was under way or waited for.

    Attributes:
        exposed: waiting for a message to come, or to leave.
        hidden: local work while at least one message that will be waited for was under way. A message may have come
            long before it is asked for, so this is the most that was hidden.
    """

    exposed: float
    hidden: float


class Marks:
    """Points in time, of the host or of a CUDA device's current stream."""

    def __init__(self, *, on_device: bool) -> None:
        self.on_device = on_device

    def now(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; of a device, the later one must have passed."""
        return float(start.elapsed_time(end)) / 1e3 if self.on_device else end - start


class ExchangeClock:
    """Adds up the times of a rank's messages. `Comm` calls it where messages begin and are waited for.

    On a device time is that of the stream which was current when the clock was made: what happens on another holds
    nothing up, until this one waits for it (`lasp.exchange.side_stream`).
    """

    def __init__(self, *, on_device: bool) -> None:
        self.on_device = on_device
        self._stream = torch.cuda.current_stream() if on_device else None
        self._marks = Marks(on_device=on_device)
        self._under_way = 0
        self._since: Any = None
        self._waits: list[tuple[Any, Any]] = []
        self._works: list[tuple[Any, Any]] = []

    def begun(self) -> None:
        """A message that will be waited for is under way."""
        if self._elsewhere():
            return
        if self._under_way == 0:
            self._since = self._marks.now()
        self._under_way += 1

    def wait_begins(self) -> None:
        if self._elsewhere():
            return
        now = self._marks.now()
        if self._under_way > 0:
            self._works.append((self._since, now))
        self._since = now

    def wait_ends(self, messages: int) -> None:
        """End the wait for so many of the messages that have begun: they have come."""
        if self._elsewhere():
            return
        now = self._marks.now()
        self._waits.append((self._since, now))
        self._under_way, self._since = max(0, self._under_way - messages), now

    def read(self) -> ExchangeTime:
        """The times so far. On a device, once its work has ended."""
        exposed, hidden = (sum(self._marks.seconds(*pair) for pair in each) for each in (self._waits, self._works))
        return ExchangeTime(exposed, hidden)

    def _elsewhere(self) -> bool:
        return self._stream is not None and torch.cuda.current_stream() != self._stream
