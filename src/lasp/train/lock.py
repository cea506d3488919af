"""One run at a time writes to a run folder."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import IO

from lasp.errors import ConfigError

LOCK = "lock"


def lock(run_dir: Path) -> IO[bytes]:
    """Claim `run_dir` while the file returned is open; it ends with the process, however that ends.

    Raises ConfigError if a process, here or on another host that shares the folder, has it, and if the folder holds
    links: what the run writes would land wherever they point.
    """
    for folder in (run_dir, run_dir / "checkpoints"):
        for item in folder.iterdir() if folder.is_dir() else ():
            if item.is_symlink():
                raise ConfigError(
                    f"{item} is a link, and a run writes to the files of its folder: put what it points to in its "
                    "place, or name another folder with --run-dir"
                )
    path = run_dir / LOCK
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = open(os.open(path, flags, 0o666), "r+b", 0)  # noqa: SIM115 - open as long as the lock is wanted
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        file.close()
        raise ConfigError(f"{path} is not a file that lasp made: remove it if no run is writing to {run_dir}")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = file.read(200).decode(errors="replace").strip() or "unknown"
        file.close()
        raise ConfigError(
            f"another run is writing to {run_dir} ({holder}): wait for its end, or name another folder with --run-dir"
        ) from error
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
    return file
