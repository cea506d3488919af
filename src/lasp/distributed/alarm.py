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
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakMethod

from torch.distributed import DistNetworkError, DistStoreError, Store

from lasp.distributed.record import ExchangeError

_PERIOD_S = 0.5
# Input that is refused on all ranks leaves them in step. They may come to it seconds apart.
_GRACE_S = 4.0
_COMPARED_CALLS = 64
# The process that keeps the store may end first: then there is nobody to tell or to hear.
_STORE_ENDED = (DistStoreError, DistNetworkError)


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


class NoAlarm:
    """Stands for an alarm where hosts hear of a failure by themselves: nobody need be told, nothing ended."""

    def raised(self, message: str, *, unless_all: bool = False) -> ExchangeError:
        """Tell the other ranks that this one has failed. unless_all: they go on if they fail at the same point too.

        Returns:
            what to raise here.
        """
        return ExchangeError(message)

    def check(self) -> None:
        """Raise ExchangeError if another rank said that it cannot go on; the group is then no longer."""

    def follow(self, trail: Trail, named: Callable[[Sequence[int]], str]) -> None:
        """Compare this rank's calls with the others' while they wait.

        named: a method that names one by its words. What it is of is not kept alive.
        """

    def ends(self, wait: Callable[[], None]) -> None:
        """Call the method `wait` too when the group's work ends, while what it is of lives.

        It ends what kernels wait for that are not the group's own.
        """

    def stop(self) -> None:
        """Hear no more, before the store ends."""


class Alarm(NoAlarm):
    """One rank's alarm, and its ear for those of the others.

    Args:
        store: that all ranks of the group share, under keys of the group's own.
        rank: of this process in the group.
        size: of the group.
        abort: ends what the group's kernels wait for, for good.
        grace_s: seconds within which ranks come to the same point of a program, if they do.
    """

    def __init__(
        self, store: Store, rank: int, size: int, abort: Callable[[], None], grace_s: float = _GRACE_S
    ) -> None:
        self.said: str | None = None
        """The message of another rank that ended the group's work, or None."""
        self._store, self._rank, self._size, self._abort, self._grace_s = store, rank, size, abort, grace_s
        self._trail = Trail()
        self._named: WeakMethod[Callable[[Sequence[int]], str]] | None = None
        self._seen = 0
        self._calls: list[tuple[int, int, str]] = []
        self._waits: list[WeakMethod[Callable[[], None]]] = []
        self._refusals: list[int] = []  # the calls begun before each
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="lasp alarm", daemon=True)
        self._thread.start()

    def raised(self, message: str, *, unless_all: bool = False) -> ExchangeError:
        point = (len(self._refusals), self._trail.number) if unless_all else None
        if unless_all:
            self._refusals.append(self._trail.number)
        with contextlib.suppress(*_STORE_ENDED):
            number = self._store.add("raised", 1)
            self._store.set(str(number), json.dumps([self._rank, message, point]))
        return ExchangeError(message)

    def check(self) -> None:
        if self.said is not None:
            raise ExchangeError(self.said)

    def follow(self, trail: Trail, named: Callable[[Sequence[int]], str]) -> None:
        self._trail, self._named = trail, WeakMethod(named)

    def ends(self, wait: Callable[[], None]) -> None:
        self._waits.append(WeakMethod(wait))

    def silence(self) -> None:
        """Let the thread end, soon."""
        self._stopped.set()

    def stop(self) -> None:
        self.silence()
        self._thread.join()

    def _listen(self) -> None:
        number = 1
        while not self._stopped.wait(_PERIOD_S):
            while (raised := self._read(str(number))) is not None:
                number += 1
                rank, message, point = raised
                if rank != self._rank and not (point and self._refuses_too(*point)):
                    self._end(message)
                    return
            if (difference := self._out_of_step()) is not None:
                self.raised(difference)
                self._end(difference)
                return

    def _out_of_step(self) -> str | None:
        """A message about the first call in which this rank waits and differs from the next one, if that waits too.

        Of ranks that are not all at the same calls some rank and the next are not.
        """
        waits, self._seen = self._trail.number == self._seen, self._trail.number
        named = None if self._named is None else self._named()
        if not waits or named is None:
            return None
        if not self._calls or self._calls[-1][0] < self._seen:
            self._calls = [(number, digest, named(words)) for number, digest, words in self._trail.last()]
            with contextlib.suppress(*_STORE_ENDED):
                self._store.set(f"at {self._rank}", json.dumps(self._calls))
        own = {number: (digest, name) for number, digest, name in self._calls}
        rank = (self._rank + 1) % self._size
        for number, digest, name in self._read(f"at {rank}") or ():
            if number in own and own[number][0] != digest:
                calls = sorted([(self._rank, own[number][1]), (rank, name)])
                lines = [f"  rank {each}: call {number}, {call}" for each, call in calls]
                return "\n".join(["the ranks disagree about what to compute, and wait for each other:", *lines])
        return None

    def _read(self, key: str) -> list[Any] | None:
        """Read what a rank wrote, if it did."""
        with contextlib.suppress(*_STORE_ENDED):
            if self._store.check([key]):
                written: list[Any] = json.loads(self._store.get(key))
                return written
        return None

    def _refuses_too(self, refusals: int, calls: int) -> bool:
        """True if this rank refuses its input where another did: after so many refusals and calls.

        False once it has begun another call instead, or does neither within the grace.
        """
        end = time.monotonic() + self._grace_s
        while True:
            went_on = self._trail.number > calls  # asked first: what it refuses it refuses before it goes on
            if len(self._refusals) > refusals:
                return self._refusals[refusals] == calls
            if went_on or time.monotonic() > end or self._stopped.wait(_PERIOD_S):
                return False

    def _end(self, message: str) -> None:
        self.said = message
        try:
            for of_memory in self._waits:
                if (end_wait := of_memory()) is not None:
                    end_wait()
        finally:
            self._abort()
