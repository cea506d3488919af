"""Checkpoints that are whole or absent: one folder a step, sealed by a manifest, moved into place by one rename.

    step-00000200/
        model.safetensors       weights, by parameter name
        optimizer.safetensors   AdamW's tensors as `<state>.<parameter name>`, and the CPU random state
        state.json              step, data position, configuration
        manifest.json           written last: size and SHA-256 of the other three, itself under a SHA-256
Nothing in it can run code. A folder without a manifest that verifies is not a checkpoint; loading reads tensors
only after verification, and takes the newest checkpoint that passes.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lasp.train.config import differences
from lasp.train.errors import CheckpointError

FORMAT = 1
_RANDOM_STATE = "random_state.cpu"


class Checkpoint(NamedTuple):
    """A verified checkpoint folder."""

    folder: Path
    state: dict[str, Any]
    """The content of state.json; `step` counts finished optimizer steps."""


def save(
    root: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint of `state["step"]` below `root`, then remove all but the newest `keep`.

    Checkpoints of later steps are removed too. state: JSON-able; must hold "step". Returns the checkpoint's
    folder. A failure at any moment leaves the checkpoints that were there.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{state['step']:08d}"
    temporary = root / f".writing-{final.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    save_file(_contiguous(dict(model.named_parameters())), temporary / "model.safetensors")
    save_file(_contiguous(_optimizer_tensors(model, optimizer)), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    files = {}
    for path in sorted(temporary.iterdir()):
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    seal = {"format": FORMAT, "step": state["step"], "files": files}
    manifest = {"sealed": seal, "sha256": _seal_digest(seal)}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _sync(temporary / "manifest.json")
    _sync(temporary)
    replaced = None
    if final.exists():  # an earlier attempt at this step: set aside, not written over
        replaced = root / f".replaced-{final.name}-{uuid.uuid4().hex[:8]}"
        os.rename(final, replaced)
    os.rename(temporary, final)
    _sync(root)
    # Only now, with a newer checkpoint safe on disk, is anything removed. Steps past this one are of a history
    # that is being written anew: damaged ones, which the run fell back from.
    leftovers = [path for path in root.iterdir() if path.name.startswith((".writing-", ".replaced-"))]
    past = [path for path in _folders(root) if path.name > final.name]
    for path in leftovers + past + _folders(root)[len(past) + keep :]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def exists(run_dir: Path) -> bool:
    """Whether a run folder has a checkpoint, good or damaged."""
    return bool(_folders(run_dir / "checkpoints"))


def find(path: Path, *, report: Callable[[str], None]) -> Checkpoint:
    """The newest good checkpoint of a run: `path` is a run folder, its `checkpoints` folder or one checkpoint.

    Each damaged newer one is named to `report`. Raises CheckpointError if none verifies; a checkpoint named
    itself is never exchanged for an older one.
    """
    if (path / "manifest.json").exists() or path.name.startswith("step-"):
        return verify(path)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    candidates = _folders(root) if root.is_dir() else []
    if not candidates:
        raise CheckpointError(f"there is no checkpoint in {path}")
    problems = []
    for folder in candidates:
        try:
            checkpoint = verify(folder)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            report(f"skipped a damaged checkpoint: {problem}")
        if problems:
            report(f"falling back to {folder}")
        return checkpoint
    raise CheckpointError("no checkpoint is usable:\n  " + "\n  ".join(problems))


def verify(folder: Path) -> Checkpoint:
    """Check a checkpoint against its manifest. Raises CheckpointError naming the first file that differs."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        seal = manifest["sealed"]
        if _seal_digest(seal) != manifest["sha256"]:
            raise CheckpointError(f"{folder}: manifest.json does not match its own SHA-256")
        if seal["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {seal['format']}, this version reads {FORMAT}")
        for name, expected in seal["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{path} should be {expected['bytes']:,} bytes long, is {path.stat().st_size:,}")
            if _sha256(path) != expected["sha256"]:
                raise CheckpointError(f"{path} does not match its SHA-256")
        return Checkpoint(folder, json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint ({error!r})") from error


def load_model(checkpoint: Checkpoint, model: nn.Module, model_config: dict[str, Any]) -> None:
    """Copy the weights into `model`. Raises CheckpointError with a diff if the model's config has changed."""
    changes = differences(checkpoint.state["model_config"], json.loads(json.dumps(model_config)))
    if changes:
        raise CheckpointError(
            f"{checkpoint.folder} was written by another model; checkpoint -> now:\n  " + "\n  ".join(changes)
        )
    tensors = load_file(checkpoint.folder / "model.safetensors")
    _copy(dict(model.named_parameters()), tensors, "model.safetensors")


def load_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore AdamW's state and the CPU random state. Raises CheckpointError if the tensors do not fit."""
    tensors = load_file(checkpoint.folder / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop(_RANDOM_STATE))
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        by_parameter.setdefault(name, {})[kind] = tensor
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name not in by_parameter:
            continue  # never stepped: AdamW has no state for it
        entry = by_parameter.pop(name)
        for kind, tensor in entry.items():
            if kind != "step" and tensor.shape != parameter.shape:
                raise CheckpointError(f"optimizer.safetensors: {kind}.{name} has shape {tuple(tensor.shape)}")
        optimizer.state[parameter] = {
            # AdamW keeps its step count on the CPU whatever the device of the weights.
            kind: tensor if kind == "step" else tensor.to(parameter.device)
            for kind, tensor in entry.items()
        }
    if by_parameter:
        raise CheckpointError(f"optimizer.safetensors has a state for unknown parameters: {sorted(by_parameter)}")


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{kind}.{names[parameter]}": tensor
        for parameter, entry in optimizer.state.items()
        for kind, tensor in entry.items()
    }
    return tensors | {_RANDOM_STATE: torch.get_rng_state()}


def _copy(targets: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor], file: str) -> None:
    if targets.keys() != tensors.keys():
        raise CheckpointError(f"{file} holds other tensors: {sorted(targets.keys() ^ tensors.keys())}")
    for name, target in targets.items():
        tensor = tensors[name]
        if (tensor.shape, tensor.dtype) != (target.shape, target.dtype):
            raise CheckpointError(
                f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {target.dtype} {tuple(target.shape)}"
            )
        with torch.no_grad():
            target.copy_(tensor)


def _contiguous(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
