"""Checkpoints that are whole or absent: one folder a step, sealed by a manifest, moved into place by one rename.

    step-00000200/
        shard-*.safetensors     one or more a process: its part of weights and optimizer (lasp.train.checkpoint.shards)
        tokenizer.json          the tokenizer, where it is a file
        state.json              step, data position, layout, configuration
        manifest.json           written last: size and SHA-256 of every other file, itself under a SHA-256
Nothing in it can run code. A folder is a checkpoint only if the manifest verifies and names exactly the files that
are there; tensors are read only after that, and loading takes the newest checkpoint that passes.
"""

import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lasp import files
from lasp.errors import CheckpointError
from lasp.train.progress import Progress
from lasp.train.world import World

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
# A checkpoint, and one that made room for another of its step, which never came.
_NAME = re.compile(r"step-(\d{8,})")
_REPLACED = re.compile(r"\.replaced-(step-\d{8,})-[0-9a-f]{8}")


class FileSeal(NamedTuple):
    """The manifest's entry of one file."""

    name: str
    num_bytes: int
    sha256: str


class Checkpoint(NamedTuple):
    """A verified checkpoint folder."""

    folder: Path
    state: dict[str, Any]
    """The content of state.json; `step` counts finished optimizer steps."""


def begin(root: Path, step: int) -> Path:
    """A new folder below `root` for the files of a checkpoint that is being written."""
    files.make_folder(root)
    restore(root)
    folder = root / f".writing-{_name(step)}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    return folder


def restore(root: Path) -> None:
    """Put back what a commit had set aside when it ended before its own was in place."""
    for path, name in _set_aside(root):
        os.rename(path, root / name)


def seal_file(path: Path, progress: Progress) -> FileSeal:
    """Wait until a file is on disk, then read it back for its seal."""
    progress.enter("writing")
    files.sync(path)
    progress.enter("reading back what was written")
    return FileSeal(path.name, files.num_bytes(path), files.sha256(path, progress=progress.note))


def commit(temporary: Path, state: dict[str, Any], written: list[FileSeal], *, keep: int) -> Path:
    """Make a checkpoint of `temporary`, whose files are `written`, on disk; then remove all but the newest `keep`.

    Checkpoints of later steps are removed too. state: JSON-able; must hold "step". Returns the checkpoint's folder.
    A failure at any moment leaves the checkpoints that were there.
    """
    root, final = temporary.parent, temporary.parent / _name(state["step"])
    files.write(temporary / STATE, json.dumps(state, indent=1))
    written = sorted([*written, seal_file(temporary / STATE, Progress())])
    sealed = {
        "format": FORMAT,
        "step": state["step"],
        "files": {file.name: {"bytes": file.num_bytes, "sha256": file.sha256} for file in written},
    }
    manifest = {"sealed": sealed, "sha256": files.json_sha256(sealed)}
    files.write(temporary / MANIFEST, json.dumps(manifest, indent=1))
    files.sync(temporary / MANIFEST)
    files.sync(temporary)
    if final.exists():  # an earlier attempt at this step: set aside, not written over
        os.rename(final, root / f".replaced-{final.name}-{uuid.uuid4().hex[:8]}")
    os.rename(temporary, final)
    files.sync(root)
    # Only now, with a newer checkpoint safe on disk, is anything removed. Steps past this one are of a history
    # that is being written anew: damaged ones, which the run fell back from.
    leftovers = [path for path in root.iterdir() if path.name.startswith((".writing-", ".replaced-"))]
    past = [path for path in _folders(root) if _step_of(path) > state["step"]]
    for path in leftovers + past + _folders(root)[len(past) + keep :]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def abandon(temporary: Path) -> None:
    """Give back the space of a checkpoint that could not be finished."""
    shutil.rmtree(temporary, ignore_errors=True)


def candidates(path: Path) -> list[Path]:
    """The folders that may be checkpoints, newest first: `path` is a run folder, its `checkpoints` or a checkpoint.

    Raises CheckpointError if there is none.
    """
    if is_checkpoint(path):
        return [path]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = _folders(root)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {path}")
    return found


def exists(run_dir: Path) -> bool:
    """True if a run folder has a checkpoint, good or damaged."""
    return bool(_folders(run_dir / "checkpoints"))


def is_checkpoint(path: Path) -> bool:
    """True if `path` names one checkpoint, good or not; it is then never exchanged for another."""
    if (path / "checkpoints").is_dir():  # a run folder, whatever its name
        return False
    return (path / MANIFEST).exists() or _NAME.fullmatch(path.name) is not None


def run_folder(path: Path) -> Path:
    """The run folder of `path`: one, its `checkpoints`, or a checkpoint in there."""
    if is_checkpoint(path):
        return path.parent.parent
    return path.parent if path.name == "checkpoints" and not (path / "checkpoints").is_dir() else path


def find(path: Path, *, report: Callable[[str], None], world: World | None = None, contents: bool = True) -> Checkpoint:
    """The newest good checkpoint among `candidates(path)`; each damaged newer one is named to `report`.

    world: its processes read the files together; collective then, with the same result on all. contents: False
    trusts the tensor files, for whoever wants settings only. Raises CheckpointError if none verifies.
    """
    if world is None:
        folders = candidates(path)
    else:
        folders = [Path(name) for name in world.run_on_first(lambda: {"folders": _names(candidates(path))})["folders"]]
    problems: list[str] = []
    for folder in folders:
        try:
            checkpoint = _verify(folder, world, contents)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            report(f"skipped a damaged checkpoint: {problem}")
        if problems:
            report(f"falling back to {folder}")
        return checkpoint
    if is_checkpoint(path):
        raise CheckpointError(problems[0])
    raise CheckpointError("no checkpoint is usable:\n  " + "\n  ".join(problems))


def verify(folder: Path) -> Checkpoint:
    """Check a checkpoint against its manifest. Raises CheckpointError naming the first file that differs."""
    return _verify(folder, None, contents=True)


def _verify(folder: Path, world: World | None, contents: bool) -> Checkpoint:
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    # The number of the first bad file; -1 only after all of them were found good.
    bad, error = 0, CheckpointError(f"{folder} was not read to its end")
    try:
        sealed = _read_manifest(folder)
    except CheckpointError as caught:
        sealed, error = {}, caught
    # state.json is small, and all processes use it.
    own = [n for n, name in enumerate(sealed) if name == STATE or (contents and n % size == rank)]
    names, progress = list(sealed), Progress()

    def read_own() -> None:
        nonlocal bad, error
        progress.enter("hashing")
        for number in own:
            try:
                _verify_file(folder / names[number], sealed[names[number]], progress)
            except CheckpointError as caught:
                bad, error = number, caught
                return
        bad = -1

    thread = threading.Thread(target=read_own, daemon=True) if sealed else None
    if thread is not None:
        thread.start()
    if world is None:
        if thread is not None:
            thread.join()
        verdicts = [bad]
    else:
        # However long it takes: a process that has read its files waits for one with larger files or a slower disk.
        world.settle(thread, progress, f"reading {folder}")
        verdicts = [int(row[0]) for row in world.gather([float(bad)])]
    if bad >= 0:
        raise error
    if max(verdicts) >= 0:
        culprit = next(rank for rank, verdict in enumerate(verdicts) if verdict >= 0)
        name = names[verdicts[culprit]]
        raise CheckpointError(f"{folder / name} does not match its manifest (read by rank {culprit})")
    try:
        return Checkpoint(folder, files.read_json(folder / STATE))
    except (OSError, ValueError) as caught:
        raise CheckpointError(f"{folder} is not a whole checkpoint ({caught!r})") from caught


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the manifest's entries by file; verify its digest, and that it names what the folder holds, to the byte."""
    try:
        manifest = files.read_json(folder / MANIFEST)
        sealed = manifest["sealed"]
        if files.json_sha256(sealed) != manifest["sha256"]:
            raise CheckpointError(f"{folder}: manifest.json does not match its own SHA-256")
        if sealed["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {sealed['format']}, this version reads {FORMAT}")
        if (_NAME.fullmatch(folder.name) or _REPLACED.fullmatch(folder.name)) and _step_of(folder) != sealed["step"]:
            raise CheckpointError(f"{folder} holds the checkpoint of step {sealed['step']}")
        named: dict[str, dict[str, Any]] = sealed["files"]
        there = {item.name for item in os.scandir(folder)} - {MANIFEST}
        if there != named.keys() or STATE not in named:
            raise CheckpointError(f"{folder}: missing or unknown files {sorted(there ^ {STATE, *named})}")
        for name, expected in named.items():
            if (length := files.num_bytes(folder / name)) != expected["bytes"]:
                raise CheckpointError(f"{folder / name} should be {expected['bytes']:,} bytes long, is {length:,}")
        return dict(sorted(named.items()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint ({error!r})") from error


def _verify_file(path: Path, expected: Mapping[str, Any], progress: Progress) -> None:
    try:
        if files.sha256(path, progress=progress.note) != expected["sha256"]:
            raise CheckpointError(f"{path} does not match its SHA-256")
    except (OSError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _names(folders: list[Path]) -> list[str]:
    return [str(folder) for folder in folders]


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest step first; the step is in the name, clocks are not asked."""
    named = [path for path in _items(root) if _NAME.fullmatch(path.name)]
    found = [path for path in named if path.is_dir() and not path.is_symlink()]
    return sorted(found + [path for path, _ in _set_aside(root)], key=_step_of, reverse=True)


def _items(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


def _set_aside(root: Path) -> list[tuple[Path, str]]:
    """Checkpoints that a commit had set aside and that nothing has replaced, each with the name that it had."""
    matches = [(path, _REPLACED.fullmatch(path.name)) for path in _items(root)]
    named = {match[1]: path for path, match in matches if match and not path.is_symlink()}
    return [(path, name) for name, path in named.items() if not (root / name).exists()]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(".replaced-").split("-")[1])
