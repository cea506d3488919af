"""Tells ranks that a GPU keeps waiting that another of them has failed.

Over NCCL a rank waits in a kernel for a message, and its host for that kernel: nothing of the program runs there, and
NCCL's own deadline is minutes away. So in every process a thread looks twice a second whether another rank has raised
an alarm in the store, and aborts the group: its kernels end, and the next call raises what the alarm says.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable

from torch.distributed import DistNetworkError, DistStoreError, Store

_PERIOD_S = 0.5
# Input that is refused on all ranks leaves them in step. They may come to it seconds apart.
_GRACE_S = 5.0


class Alarm:
    """One rank's alarm, and its ear for those of the others.

    Args:
        store: that all ranks of the group share, under keys of the group's own.
        rank: of this process in the group.
        abort: ends what the group's kernels wait for, for good.
        grace_s: seconds within which ranks come to the same point of a program.
    """

    def __init__(self, store: Store, rank: int, abort: Callable[[], None], grace_s: float = _GRACE_S) -> None:
        self.said: str | None = None
        """The message of another rank that ended the group's work, or None."""
        self._store, self._rank, self._abort, self._grace_s = store, rank, abort, grace_s
        self._waits: list[Callable[[], None]] = []
        self._refused_at = -float("inf")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="lasp alarm", daemon=True)
        self._thread.start()

    def raise_for_all(self, message: str, *, unless_all: bool = False) -> None:
        """Tell the other ranks that this one has failed. unless_all: they go on if they fail within seconds too."""
        if unless_all:
            self._refused_at = time.monotonic()
        number = self._store.add("raised", 1)
        self._store.set(str(number), json.dumps([self._rank, message, unless_all]))

    def ends(self, wait: Callable[[], None]) -> None:
        """Call `wait` too when the group's work ends: it ends what kernels wait for that are not the group's own."""
        self._waits.append(wait)

    def silence(self) -> None:
        """Let the thread end, soon."""
        self._stopped.set()

    def stop(self) -> None:
        """End the thread, before the store ends."""
        self.silence()
        self._thread.join()

    def _listen(self) -> None:
        number = 1
        while not self._stopped.wait(_PERIOD_S):
            while (raised := self._raised(number)) is not None:
                number += 1
                rank, message, unless_all = raised
                if rank != self._rank and not (unless_all and self._refused_too()):
                    self._end(message)
                    return

    def _raised(self, number: int) -> tuple[int, str, bool] | None:
        """The rank, the message, and if it stands unless all ranks refuse; None while there is no alarm `number`."""
        with contextlib.suppress(DistStoreError, DistNetworkError):  # the process that keeps the store has ended
            if self._store.check([str(number)]):
                rank, message, unless_all = json.loads(self._store.get(str(number)))
                return rank, message, unless_all
        return None

    def _refused_too(self) -> bool:
        """True if this rank refuses its input too, within the grace after another did."""
        heard = time.monotonic()
        while abs(heard - self._refused_at) > self._grace_s:
            if time.monotonic() - heard > self._grace_s or self._stopped.wait(_PERIOD_S):
                return False
        return True

    def _end(self, message: str) -> None:
        self.said = message
        for end_wait in self._waits:
            end_wait()
        self._abort()
