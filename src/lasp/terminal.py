"""Writes to a terminal, a pipe or a log: nothing that a terminal would obey, and never in the way.

All that the program prints goes through here (tests/test_terminal.py looks for what does not): `say`, or a `Terminal`
where there are tables, colours or a moving line.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

# A pipe that can take anything takes so much at once without waiting (POSIX: PIPE_BUF is at least 512).
_PIECE_BYTES = 512
# What nobody reads is kept up to here; then the oldest goes.
_MOST_BYTES = 1 << 20


# Control characters but for line ends and tabs, those that turn the direction of text or hide in it, and halves of
# characters, as undecodable bytes of a path leave them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` with signs for whatever a terminal would obey or not show; line ends and tabs stay.

    Paths, names, prompts and generated text may hold anything.
    """
    return _UNSEEN.sub(_sign, text)


def counted(count: int, one: str, several: str | None = None) -> str:
    """Returns so many of something in words, "1 step", "12,000 steps"; `several`: its plural, if not one with an s."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def say(text: object = "", *, error: bool = False, end: str = "\n") -> None:
    """Print text, made printable, to standard output or, `error`, to standard error; nothing is held back."""
    print(printable(str(text)), file=sys.stderr if error else sys.stdout, end=end, flush=True)


class Terminal(Console):
    """rich's console, of which every text is made printable, whatever renders it; markup is text here."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make what is not shown visible, then do as rich does, which would leave out some of it."""
        return super().render_str(printable(text), **options)

    def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:  # type: ignore[override]
        """Render, and make visible what is no order of rich's own, which it marks as such."""
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def _sign(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


class Outlet(io.TextIOBase):
    """Text to standard output by whoever must not wait for its reader: what cannot go now goes later.

    Where it fails for good (its reader has gone) or for now (a full disk), standard error is told once.
    """

    def __init__(self) -> None:
        self._stream = sys.stdout
        self._descriptor: int | None = None
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a stand-in, or no standard output at all
            self._descriptor = self._stream.fileno()
        self._waiting = bytearray()
        self._lock = threading.RLock()
        self._told = self._closed = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._descriptor is not None and os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            if self._descriptor is None:
                if self._stream is not None:
                    self._stream.write(text)
                return len(text)
            if not self._closed:
                self._waiting += text.encode(self.encoding, "replace")
                del self._waiting[: max(0, len(self._waiting) - _MOST_BYTES)]
                self._drain()
        return len(text)

    def flush(self) -> None:
        with self._lock:
            self._drain()

    def settle(self, timeout_s: float) -> None:
        """Give a slow reader so long, at the end, to take what waits; where nothing could be written, one more try."""
        end = time.monotonic() + timeout_s
        self.flush()
        while self._waiting and not self._told and time.monotonic() < end:
            time.sleep(0.05)
            self.flush()

    def _drain(self) -> None:
        if self._descriptor is None:
            return
        try:
            while self._waiting and _takes(self._descriptor):
                del self._waiting[: os.write(self._descriptor, self._waiting[:_PIECE_BYTES])]
        except BrokenPipeError:
            self._closed = True
            self._tell("nobody reads standard output any more")
        except OSError as error:
            self._tell(f"standard output takes nothing now: {error.strerror}")

    def _tell(self, problem: str) -> None:
        if not self._told:
            self._told = True
            with contextlib.suppress(OSError, ValueError, AttributeError):
                say(f"lasp: {problem}; the run goes on, and its figures are in metrics.jsonl", error=True)


def _takes(descriptor: int) -> bool:
    """True if a write would not wait."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(0))  # also where it would fail, and say why
