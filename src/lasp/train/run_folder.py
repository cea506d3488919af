"""The folder of a run: one run at a time writes to it, and what was in it stays until that run is past it."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lasp.errors import ConfigError
from lasp.train import checkpoint
from lasp.train.checkpoint import Checkpoint
from lasp.train.config import AUTO, TrainConfig
from lasp.train.world import World

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


class RunFolder:
    """The folder that a run writes to, from when it is claimed until its process ends; all processes have one alike.

    Attributes:
        resumed: the checkpoint that the run goes on from, if any.
        path: of the folder, once it is open.
    """

    def __init__(
        self, config: TrainConfig, world: World, resume: Path | None, *, report: Callable[[str], None]
    ) -> None:
        """Claim what is there, then look for the newest checkpoint in it; collective.

        resume: a run folder or checkpoint to go on from, or AUTO. report: told of damaged checkpoints. Raises
        ConfigError if another run has the folder, CheckpointError without a usable checkpoint.
        """
        self._config, self._world, self._resume = config, world, resume
        self._lock: IO[bytes] | None = None
        self._made: Path | None = None
        # Whoever looks before the folder is its own may go on from what another run is about to replace.
        world.run_on_first(self._claim)
        self.resumed = self._find_checkpoint(report)
        self.path = Path()

    def open(self) -> Path:
        """Take the folder, on the first process: it is the run's from here on. Raises ConfigError for one in use."""
        run_dir = self._choose()
        if self._lock is None:
            run_dir.mkdir(parents=True, exist_ok=True)
            is_new = not any(run_dir.iterdir())
            self._lock = lock(run_dir)
            _refuse_full(run_dir)  # another run may have begun there while the text was prepared
            if is_new:
                self._made = run_dir
        return run_dir

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around all that comes before the first step: a start that fails leaves no folder, so no run to continue."""
        try:
            yield
        except BaseException:
            if self._made is not None:
                shutil.rmtree(self._made, ignore_errors=True)
            raise

    def _claim(self) -> dict[str, Any]:
        """Take the run folder, on the first process, where there is one."""
        home, resume = None, self._resume
        if resume is not None and resume != AUTO:
            checkpoint.candidates(resume)
            home = checkpoint.run_folder(resume)
        run_dir = self._config.run_dir or home
        if run_dir is not None and run_dir.exists():
            if resume != AUTO and (home is None or run_dir.resolve() != home.resolve()):
                _refuse_full(run_dir)  # before a lock is put there
            self._lock = lock(run_dir)
            checkpoint.restore(run_dir / "checkpoints")
        return {}

    def _find_checkpoint(self, report: Callable[[str], None]) -> Checkpoint | None:
        resume, run_dir = self._resume, self._config.run_dir
        if resume == AUTO:
            begun = self._world.run_on_first(lambda: {"yes": run_dir is not None and checkpoint.exists(run_dir)})["yes"]
            resume = run_dir if begun else None
        if resume is None:
            return None
        return checkpoint.find(resume, report=report, world=self._world)

    def _choose(self) -> Path:
        """Choose the folder: as configured, that of the run continued, or a new one. Raises ConfigError.

        With AUTO, what is in it may be of an earlier try that ended before its first checkpoint.
        """
        found, model = self.resumed, self._config.model
        home = checkpoint.run_folder(found.folder) if found is not None else None
        run_dir = self._config.run_dir or home
        if run_dir is None:
            return _new_folder(Path("runs"), f"{model.family}-{model.size}")
        if home is not None and found is not None and run_dir.resolve() == home.resolve():
            named = self._resume is not None and checkpoint.is_checkpoint(self._resume)  # else the newest good one
            newest = checkpoint.find(home, report=lambda _: None).folder if named else found.folder
            if newest.resolve() != found.folder.resolve():
                raise ConfigError(
                    f"{found.folder} is not the newest checkpoint of its run ({newest.name} is), and going on "
                    "from it would write over what followed: name a new folder with --run-dir"
                )
        return run_dir


def _refuse_full(run_dir: Path) -> None:
    """Raise ConfigError unless there is nothing in a run folder but its lock."""
    if any(item.name != LOCK for item in run_dir.iterdir()):
        advice = f"continue it with --resume {run_dir}, or name" if checkpoint.exists(run_dir) else "name"
        raise ConfigError(f"{run_dir} is not empty: {advice} another")


def _new_folder(parent: Path, name: str) -> Path:
    """A folder below `parent` that does not exist yet, named by the time of day."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        folder = parent / f"{name}-{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"cannot find a free name below {parent}: give --run-dir")
