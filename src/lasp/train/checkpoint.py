"""Checkpoints that are whole or absent: one folder a step, sealed by a manifest, moved into place by one rename.

    step-00000200/
        shard-*.safetensors     one or more a process: its part of weights and optimizer (lasp.train.shards)
        tokenizer.json          the tokenizer, where it is a file
        state.json              step, data position, layout, configuration
        manifest.json           written last: size and SHA-256 of every other file, itself under a SHA-256
Nothing in it can run code. A folder is a checkpoint only if the manifest verifies and names exactly the files that
are there; tensors are read only after that, and loading takes the newest checkpoint that passes.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lasp.train.errors import CheckpointError
from lasp.train.world import World

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
# Far above what a model needs; a file of another kind in its place is not read into memory.
_MAX_JSON_BYTES = 64 << 20


class FileSeal(NamedTuple):
    """What the manifest says of one file."""

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
    folder = root / f".writing-{_name(step)}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def seal_file(path: Path) -> FileSeal:
    """Wait until a file is on disk, then read it back for its seal."""
    _sync(path)
    return FileSeal(path.name, path.stat().st_size, _sha256(path))


def commit(temporary: Path, state: dict[str, Any], files: list[FileSeal], *, keep: int) -> Path:
    """Make a checkpoint of `temporary`, whose `files` are on disk; then remove all but the newest `keep`.

    Checkpoints of later steps are removed too. state: JSON-able; must hold "step". Returns the checkpoint's folder.
    A failure at any moment leaves the checkpoints that were there.
    """
    root, final = temporary.parent, temporary.parent / _name(state["step"])
    (temporary / STATE).write_text(json.dumps(state, indent=1))
    files = sorted([*files, seal_file(temporary / STATE)])
    sealed = {
        "format": FORMAT,
        "step": state["step"],
        "files": {file.name: {"bytes": file.num_bytes, "sha256": file.sha256} for file in files},
    }
    manifest = {"sealed": sealed, "sha256": _seal_digest(sealed)}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(temporary / MANIFEST)
    _sync(temporary)
    if final.exists():  # an earlier attempt at this step: set aside, not written over
        os.rename(final, root / f".replaced-{final.name}-{uuid.uuid4().hex[:8]}")
    os.rename(temporary, final)
    _sync(root)
    # Only now, with a newer checkpoint safe on disk, is anything removed. Steps past this one are of a history
    # that is being written anew: damaged ones, which the run fell back from.
    leftovers = [path for path in root.iterdir() if path.name.startswith((".writing-", ".replaced-"))]
    past = [path for path in _folders(root) if path.name > final.name]
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
    found = _folders(root) if root.is_dir() else []
    if not found:
        raise CheckpointError(f"there is no checkpoint in {path}")
    return found


def exists(run_dir: Path) -> bool:
    """Whether a run folder has a checkpoint, good or damaged."""
    return bool(_folders(run_dir / "checkpoints"))


def is_checkpoint(path: Path) -> bool:
    """Whether `path` names one checkpoint, good or not; it is then never exchanged for another."""
    return (path / MANIFEST).exists() or path.name.startswith("step-")


def find(path: Path, *, report: Callable[[str], None], world: World | None = None, contents: bool = True) -> Checkpoint:
    """The newest good checkpoint among `candidates(path)`; each damaged newer one is named to `report`.

    world: its processes read the files together; collective then, with the same result on all. contents: False
    trusts the tensor files, for whoever wants settings only. Raises CheckpointError if none verifies.
    """
    if world is None:
        folders = candidates(path)
    else:
        folders = [Path(name) for name in world.first_does(lambda: {"folders": _names(candidates(path))})["folders"]]
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
    bad, error = -1, None
    try:
        files = _read_manifest(folder)
    except CheckpointError as caught:
        files, bad, error = {}, 0, caught
    for number, (name, expected) in enumerate(files.items()):
        # state.json is small, and all processes use it.
        if (name == STATE or (contents and number % size == rank)) and bad < 0:
            try:
                _verify_file(folder / name, expected)
            except CheckpointError as caught:
                bad, error = number, caught
    if world is not None:
        verdicts = [int(row[0]) for row in world.gather([float(bad)])]
        if error is None and max(verdicts) >= 0:
            culprit = next(rank for rank, verdict in enumerate(verdicts) if verdict >= 0)
            name = list(files)[verdicts[culprit]]
            error = CheckpointError(f"{folder / name} does not match its manifest (read by rank {culprit})")
    if error is not None:
        raise error
    try:
        return Checkpoint(folder, json.loads((folder / STATE).read_text()))
    except (OSError, ValueError) as caught:
        raise CheckpointError(f"{folder} is not a whole checkpoint ({caught!r})") from caught


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file, after it proved itself and names what the folder holds, to the byte."""
    try:
        path = folder / MANIFEST
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is {path.stat().st_size:,} bytes long, too long for a manifest")
        manifest = json.loads(path.read_text())
        sealed = manifest["sealed"]
        if _seal_digest(sealed) != manifest["sha256"]:
            raise CheckpointError(f"{folder}: manifest.json does not match its own SHA-256")
        if sealed["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {sealed['format']}, this version reads {FORMAT}")
        if folder.name.startswith("step-") and folder.name != _name(sealed["step"]):
            raise CheckpointError(f"{folder} holds the checkpoint of step {sealed['step']}")
        files: dict[str, dict[str, Any]] = sealed["files"]
        there = {item.name for item in os.scandir(folder)} - {MANIFEST}
        if there != files.keys() or STATE not in files:
            raise CheckpointError(f"{folder}: missing or unknown files {sorted(there ^ {STATE, *files})}")
        for name, expected in files.items():
            if (length := (folder / name).stat().st_size) != expected["bytes"]:
                raise CheckpointError(f"{folder / name} should be {expected['bytes']:,} bytes long, is {length:,}")
        return dict(sorted(files.items()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint ({error!r})") from error


def _verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    try:
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} does not match its SHA-256")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _names(folders: list[Path]) -> list[str]:
    return [str(folder) for folder in folders]


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest step first; the step is in the name, clocks are not asked."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), reverse=True)


def _seal_digest(seal: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
