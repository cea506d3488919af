"""Lets signals stop a run, and ends a process with whoever started it."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C, kill, a terminal that is closed, Ctrl-\, and what schedulers send some time before they end a job.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# Of these a second one means "now". Others may come twice by themselves: a closed terminal's from kernel and shell.
IMPATIENT = (signal.SIGINT, signal.SIGTERM)
_SET_PARENT_DEATH_SIGNAL = 1


@contextmanager
def stop_signals(react: Callable[[int], None], *, once: bool) -> Iterator[None]:
    """Call `react` with the number of every one of STOP_SIGNALS that comes. Outside of the main thread: nothing.

    once: the second of a kind of IMPATIENT acts as usual, at once. SIGHUP stays ignored where it was: nohup does that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}

    def handle(number: int, _frame: object) -> None:
        if once and number in IMPATIENT:
            signal.signal(number, before[number])
        react(number)

    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, even if this one is stopped (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
