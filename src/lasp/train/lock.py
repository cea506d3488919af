"""One run at a time writes to a run folder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from lasp.train.errors import ConfigError


def lock(run_dir: Path) -> IO[str]:
    """Claim `run_dir` while the file returned is open; it ends with the process, however that ends.

    Raises ConfigError if a process, here or on another host that shares the folder, has it.
    """
    file = open(run_dir / "lock", "a+")  # noqa: SIM115 - open as long as the lock is wanted
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read(200).strip() or "unknown"
        file.close()
        raise ConfigError(
            f"another run is writing to {run_dir} ({holder}): wait for its end, or name another folder with --run-dir"
        ) from error
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
    file.flush()
    return file
