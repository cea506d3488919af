"""A trained model for others: one safetensors file, and what it takes to build the model and its tokenizer.

model.safetensors   weights by parameter name, as `CausalLM(ModelConfig(**model_config))` names them
tokenizer.json      the tokenizer, where it is a file
config.json         "model_config"; "tokenizer", "bytes" or the name of that file, and "tokenizer_id", which names the
                    mapping itself by the file's SHA-256; "step", finished steps of the run; "prompt", its sample's
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lasp.data.tokenizer import files_of, read_tokenizer
from lasp.models import CausalLM, ModelConfig
from lasp.train import checkpoint, shards
from lasp.train.errors import CheckpointError, ConfigError

FORMAT = 1
_WEIGHTS, _ABOUT = "model.safetensors", "config.json"


def export(source: Path, out: Path, *, report: Callable[[str], None]) -> Path:
    """Write the model of `source`, a run folder or checkpoint, to the new folder `out`.

    report: told of damaged checkpoints. Raises ConfigError if `out` exists, CheckpointError without a good checkpoint.
    """
    if out.exists():
        raise ConfigError(f"--out must name a new folder, {out} exists")
    found = checkpoint.find(source, report=report)
    model = CausalLM(ModelConfig(**found.state["model_config"]))
    shards.load(found, model, found.state["model_config"])
    tokenizer = read_tokenizer(found.folder, found.state["tokenizer"])
    beside = files_of(tokenizer)
    about = {
        "format": FORMAT,
        "step": found.state["step"],
        "tokenizer": next(iter(beside), tokenizer.name),
        "tokenizer_id": tokenizer.name,
        "prompt": found.state.get("sample_prompt", ""),
        "model_config": found.state["model_config"],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".writing-{out.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
        save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        for name, content in beside.items():
            (temporary / name).write_bytes(content)
        (temporary / _ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def is_export(folder: Path) -> bool:
    """Whether `folder` is one that `export` wrote."""
    return (folder / _WEIGHTS).exists() and (folder / _ABOUT).exists()


def read(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises CheckpointError if it is not of `export`."""
    try:
        about: dict[str, Any] = json.loads((folder / _ABOUT).read_text())
        if about["format"] != FORMAT:
            raise CheckpointError(f"{folder} has export format {about['format']}, this version reads {FORMAT}")
        ModelConfig(**about["model_config"])
        return about
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a folder of `lasp export` ({error!r})") from error


def check(folder: Path, model_config: dict[str, Any], tokenizer_id: str) -> None:
    """Raise CheckpointError, with what differs, if `folder` holds another model or one for another tokenizer."""
    about = read(folder)
    shards.refuse_other_model(folder, about["model_config"], model_config)
    if tokenizer_id != about["tokenizer_id"]:
        raise CheckpointError(f"{folder} was trained with tokenizer {about['tokenizer_id']}, not {tokenizer_id}")


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy the exported weights into `model`, whole in this process. Raises CheckpointError if they do not fit."""
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {folder / _WEIGHTS}: {error}") from error
    targets = dict(model.named_parameters())
    if targets.keys() != tensors.keys():
        raise CheckpointError(f"{folder} holds other weights: {sorted(targets.keys() ^ tensors.keys())}")
    for name, target in targets.items():
        if (tensors[name].dtype, tensors[name].shape) != (target.dtype, target.shape):
            raise CheckpointError(f"{folder}: {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}")
        with torch.no_grad():
            target.copy_(tensors[name])
