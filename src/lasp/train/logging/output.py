"""Prints a run's progress: once, on the first process. A moving bar on a terminal, a line every N steps elsewhere."""

import time
from collections.abc import Callable, Mapping
from typing import IO, cast

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lasp.terminal import Outlet, Terminal
from lasp.train.logging.step_metrics import StepFigures

_LAST_WAIT_S = 10.0

# Columns of a terminal from which on the bar is drawn at full length.
_WIDE = 120


class Output:
    """Prints on the first process, and nowhere else; never waits, and never fails."""

    def __init__(self, *, enabled: bool, log_every: int) -> None:
        self.enabled, self.log_every = enabled, log_every
        self._outlet = Outlet()
        self._refused: set[str] = set()
        self.console = Terminal(file=cast(IO[str], self._outlet), soft_wrap=True, quiet=not enabled)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._step_seconds: float | None = None

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """A heading and aligned lines."""
        width = max(len(name) for name in rows) + 2
        self.heading(title)
        for name, text in rows.items():
            self.line(f"  {name:<{width}}{text}")

    def heading(self, text: str) -> None:
        self.console.print(f"\n{text}", style="bold")

    def piece(self, text: str) -> None:
        """Part of a line."""
        self.console.print(text, end="")

    def line(self, text: str) -> None:
        self.console.print(text)

    def attempt(self, what: str, work: Callable[[], object]) -> bool:
        """Do `work`, which writes something down; whether it could. Of a `what` that could not, one line is printed."""
        try:
            work()
        except Exception as error:  # whatever is wrong with a log, the run is worth more
            if what not in self._refused:
                self._refused.add(what)
                self.line(f"{what} could not be written, and the run goes on: {error}")
            return False
        return True

    def close(self, timeout_s: float) -> None:
        """Wait so long, and not long, for a slow reader."""
        self._outlet.settle(min(timeout_s, _LAST_WAIT_S))

    def start(self, finished: int, total: int) -> None:
        """Begin showing progress."""
        if not (self.enabled and self.console.is_terminal):
            return
        self._progress = Progress(
            BarColumn(bar_width=24 if self.console.width >= _WIDE else 8),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )
        self._task = self._progress.add_task("", completed=finished, total=total, text="")
        self._progress.start()

    def step(self, finished: int, total: int, *, seconds: float, figures: StepFigures) -> None:
        """Show a finished step that took `seconds`."""
        before = self._step_seconds
        self._step_seconds = seconds if before is None else 0.95 * before + 0.05 * seconds
        left = (total - finished) * self._step_seconds
        tokens_per_s = figures.tokens_per_s * seconds / self._step_seconds
        parts = [
            f"{duration(left)} left",
            f"loss {figures.loss:.4f}",
            f"{tokens_per_s:,.0f} tokens/s",
            *([] if figures.mfu is None else [f"{figures.mfu:.1%} of peak"]),
            f"grad {figures.grad_norm:.2f}",
            f"exchanged {bytes_text(figures.exchanged_bytes)}/step, {figures.exposed_s / seconds:.0%} waiting",
            f"peak {bytes_text(figures.peak_memory_bytes)}",
        ]
        if self._progress is not None and self._task is not None:
            taken = (24 if self.console.width >= _WIDE else 8) + 2 * len(str(total)) + len("/   ")
            self._progress.update(self._task, completed=finished, text=_fitting(parts, self.console.width - taken))
        elif finished % self.log_every == 0 or finished == total:
            self.line(f"step {finished:>{len(str(total))}}/{total}  {'  '.join(parts)}")

    def stop(self) -> None:
        """End the progress bar; harmless if there is none."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _fitting(parts: list[str], width: int) -> str:
    """Join as many of `parts`, the first first, as a line has room for."""
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts = parts[:-1]
    return "  ".join(parts)


class Stopwatch:
    """Seconds since it was made, by a clock that no one sets."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start


def duration(seconds: float) -> str:
    """ "42 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def bytes_text(count: float) -> str:
    """ "512 B", "1.5 KiB", "2.0 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
