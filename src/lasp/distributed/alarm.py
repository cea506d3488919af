"""Tells ranks that a GPU keeps waiting that another of them has failed.

Over NCCL a rank waits in a kernel for a message, and its host for that kernel: nothing of the program runs there, and
NCCL's own deadline is minutes away. So in every process a thread looks twice a second whether another rank has raised
an alarm in the store, and aborts the group: its kernels end, and the next call raises what the alarm says.

Where all ranks wait, each for a message of another call, none of them finds a wrong one. So the thread of a rank that
has begun no call between two looks writes down which ones it began last, and compares them with what others wrote.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, Store

_PERIOD_S = 0.5
# Input that is refused on all ranks leaves them in step. They may come to it seconds apart.
_GRACE_S = 5.0
_COMPARED_CALLS = 64


class Trail:
    """The calls that a rank has begun, each with what stands for it and all before it: the same on ranks in step."""

    def __init__(self) -> None:
        self.number = 0
        self._digest = 0
        self._last: deque[tuple[int, int, tuple[int, ...]]] = deque(maxlen=_COMPARED_CALLS)

    def add(self, *words: int) -> None:
        """Count a call, for which the words stand."""
        self.number += 1
        self._digest = hash((self._digest, *words))
        self._last.append((self.number, self._digest, words))

    def last(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """Number, digest and words of each of the last calls. For other threads."""
        return list(self._last.copy())


class Alarm:
    """One rank's alarm, and its ear for those of the others.

    Args:
        store: that all ranks of the group share, under keys of the group's own.
        rank: of this process in the group.
        size: of the group.
        abort: ends what the group's kernels wait for, for good.
        grace_s: seconds within which ranks come to the same point of a program.
    """

    def __init__(
        self, store: Store, rank: int, size: int, abort: Callable[[], None], grace_s: float = _GRACE_S
    ) -> None:
        self.said: str | None = None
        """The message of another rank that ended the group's work, or None."""
        self._store, self._rank, self._size, self._abort, self._grace_s = store, rank, size, abort, grace_s
        self._trail = Trail()
        self._named: Callable[[tuple[int, ...]], str] = repr
        self._seen = self._written = 0
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

    def follow(self, trail: Trail, named: Callable[[tuple[int, ...]], str]) -> None:
        """Compare this rank's calls with the others' while they wait. named: what people are told of one's words."""
        self._trail, self._named = trail, named

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
            if (difference := self._out_of_step()) is not None:
                self.raise_for_all(difference)
                self._end(difference)
                return

    def _raised(self, number: int) -> tuple[int, str, bool] | None:
        """The rank, the message, and if it stands unless all ranks refuse; None while there is no alarm `number`."""
        raised = self._read(str(number))
        return None if raised is None else (raised[0], raised[1], raised[2])

    def _out_of_step(self) -> str | None:
        """A message about the first call in which this rank waits and differs from the next one, if that waits too.

        Of ranks that are not all at the same calls some rank and the next are not.
        """
        waits, self._seen = self._trail.number == self._seen, self._trail.number
        if not waits or not self._seen:
            return None
        own = {number: (digest, self._named(words)) for number, digest, words in self._trail.last()}
        if self._written < self._seen:
            self._written = self._seen
            with contextlib.suppress(DistStoreError, DistNetworkError):
                self._store.set(f"at {self._rank}", json.dumps([(number, *call) for number, call in own.items()]))
        rank = (self._rank + 1) % self._size
        for number, digest, name in self._read(f"at {rank}") or ():
            if number in own and own[number][0] != digest:
                calls = sorted([(self._rank, own[number][1]), (rank, name)])
                lines = [f"  rank {each}: call {number}, {call}" for each, call in calls]
                return "\n".join(["the ranks disagree about what to compute, and wait for each other:", *lines])
        return None

    def _read(self, key: str) -> list[Any] | None:
        """Read what a rank wrote, if it did."""
        with contextlib.suppress(DistStoreError, DistNetworkError):  # the process that keeps the store has ended
            if self._store.check([key]):
                written: list[Any] = json.loads(self._store.get(key))
                return written
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
