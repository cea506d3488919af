"""Remembers the SHA-256 of files that were read whole once, as long as their size and time of change stay."""

import contextlib
import json
import time
from pathlib import Path

from lasp import files

# A file changed again so soon may keep its time of change, of which clocks and file systems have steps.
_SETTLED_NS = 10_000_000_000


class Verified:
    """Digests by absolute path, kept in a file of their own.

    Args:
        memory: that file; made and written over by `save`.
        full: believe none of it.
    """

    def __init__(self, memory: Path, *, full: bool) -> None:
        self._memory, self._known = memory, dict[str, list[int | str]]()
        self._is_new = False
        if not full:
            try:
                known = files.read_json(memory)
                self._known = {str(path): list(entry) for path, entry in known.items()}
            except (OSError, ValueError, AttributeError, TypeError):
                pass  # nothing is known: all is read again

    def known(self, path: Path) -> str | None:
        """The digest of the file's content, None if it was not read yet or has changed since."""
        entry = self._known.get(str(path.absolute()))
        if entry is None or entry[:2] != _times(path)[:2]:
            return None
        return str(entry[2])

    def remember(self, path: Path, sha256: str) -> None:
        """Note the digest of a file that was read just now; not of one that was changed just before."""
        size, changed = _times(path)
        if time.time_ns() - changed > _SETTLED_NS:
            self._known[str(path.absolute())] = [size, changed, sha256]
            self._is_new = True

    def sha256(self, path: Path) -> str:
        """The known digest, or that of the content, which is then known."""
        if (known := self.known(path)) is not None:
            return known
        digest = files.sha256(path, follow=True)
        self.remember(path, digest)
        return digest

    def save(self) -> None:
        """Write what is known, whole or not at all; a folder that cannot be written to costs the next start only."""
        if not self._is_new:
            return
        with contextlib.suppress(OSError):
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            files.write(self._memory, json.dumps(self._known))


def _times(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
