"""A trained model for others: one safetensors file, and what it takes to build the model and its tokenizer.

model.safetensors   weights by parameter name, as `CausalLM(ModelConfig.from_dict(model_config))` names them
tokenizer.json      the tokenizer, where it is a file
config.json         "model_config"; "model", the options of `lasp train` that give it; "tokenizer", "bytes" or the name
                    of that file, and "tokenizer_id", which names the mapping itself by the file's SHA-256; "step",
                    finished steps of the run; "prompt", its sample's; "files", size and SHA-256 of every other file;
                    "sha256", of all the rest of this one
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lasp import files
from lasp.data.tokenizer import Tokenizer, files_of, read_tokenizer
from lasp.errors import CheckpointError, ConfigError
from lasp.models import CausalLM, ModelConfig
from lasp.train.checkpoint import sealed, shards, transformers_folder
from lasp.train.checkpoint.tensor_file import TensorFile
from lasp.train.config import ModelOptions
from lasp.train.settings_file import from_dict

FORMAT = 3
# That of models without a configuration of the mixer, which `ModelConfig.from_dict` reads too.
_OLDER = 2
_WEIGHTS, _ABOUT = "model.safetensors", "config.json"


def export(source: Path, out: Path, *, report: Callable[[str], None], for_transformers: bool = False) -> Path:
    """Write the model of `source`, a run folder or checkpoint, to the new folder `out`.

    report: told of damaged checkpoints, and of what the folder needs. for_transformers: in the form of that library.
    Raises ConfigError if `out` exists or the form has no such model, CheckpointError without a good checkpoint.
    """
    if out.exists():
        raise ConfigError(f"--out must name a new folder, {out} exists")
    found = sealed.find(source, report=report)
    model_config = ModelConfig.from_dict(found.state["model_config"])
    if for_transformers:
        transformers_folder.check(model_config)
        if transformers_folder.needs_newer(model_config):
            report(f"this model has groups: {transformers_folder.NEWER}")
    model = CausalLM(model_config)
    shards.load(found, model, model_config.to_dict())
    own = read_tokenizer(found.folder, found.state["tokenizer"])
    if for_transformers:
        with files.whole_folder(out) as temporary:
            transformers_folder.write(temporary, model, own)
            _settle(temporary)
        return out
    beside = files_of(own)
    about = {
        "format": FORMAT,
        "step": found.state["step"],
        "tokenizer": next(iter(beside), own.name),
        "tokenizer_id": own.name,
        "prompt": found.state.get("sample_prompt", ""),
        "model": found.state["config"]["model"],
        "model_config": model_config.to_dict(),
    }
    with files.whole_folder(out) as temporary:
        tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
        save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        for name, content in beside.items():
            files.write(temporary / name, content)
        seal(temporary, about)
    return out


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write config.json, `about` and the digests of all other files of `folder`, and wait until all is on disk."""
    digests = {}
    for path in sorted(folder.iterdir()):
        files.sync(path)
        digests[path.name] = {"bytes": files.num_bytes(path), "sha256": files.sha256(path)}
    about = {**about, "files": digests}
    files.write(folder / _ABOUT, json.dumps({**about, "sha256": files.json_sha256(about)}, indent=1) + "\n")
    _settle(folder)


def _settle(folder: Path) -> None:
    """Wait until all is on disk, for everybody to read."""
    for path in folder.iterdir():
        # As new files are here: safetensors makes its own for nobody else to read.
        os.chmod(path, (folder / _ABOUT).stat().st_mode)
        files.sync(path)
    files.sync(folder)


def is_export(folder: Path) -> bool:
    """True if `folder` is one that `export` wrote, or one of transformers."""
    return (folder / _WEIGHTS).exists() and (folder / _ABOUT).exists()


def read(folder: Path) -> dict[str, Any]:
    """The content of config.json, of a folder of transformers what `export` would have written of the model.

    Raises CheckpointError if it is neither, or damaged.
    """
    try:
        about: dict[str, Any] = files.read_json(folder / _ABOUT)
        if transformers_folder.is_one(about):
            return transformers_folder.read(folder, about)
        if about["format"] not in (_OLDER, FORMAT):
            raise CheckpointError(
                f"{folder} has export format {about['format']}, this version reads {FORMAT}: export the run again"
            )
        if about.pop("sha256") != files.json_sha256(about):
            raise CheckpointError(f"{folder / _ABOUT} does not match its own SHA-256")
        ModelConfig.from_dict(about["model_config"])
        return about
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is not a folder of `lasp export` ({error!r})") from error


def verify(folder: Path) -> dict[str, Any]:
    """The content of config.json, after every file was found as it says. Raises CheckpointError naming the first."""
    about = read(folder)
    for name, expected in about["files"].items():
        path = folder / Path(name).name
        try:
            if files.num_bytes(path) != expected["bytes"] or files.sha256(path) != expected["sha256"]:
                raise CheckpointError(f"{path} does not match its SHA-256 in {_ABOUT}: export the run again")
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
    return about


def model_options(folder: Path) -> ModelOptions:
    """The options of `lasp train` that give the exported model. Raises CheckpointError."""
    try:
        return from_dict(ModelOptions, read(folder)["model"])
    except ConfigError as error:
        raise CheckpointError(f"{folder} is of another version: {error}") from error


def tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the exported model. Raises CheckpointError, and DataError for a damaged tokenizer file."""
    return read_tokenizer(folder, read(folder)["tokenizer_id"])


def check(folder: Path, model_config: dict[str, Any]) -> None:
    """Raise CheckpointError, with what differs, if `folder` holds another model."""
    shards.refuse_other_model(folder, read(folder)["model_config"], model_config)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy the exported weights into `model`, whole in this process. Raises CheckpointError if they are damaged or do
    not fit."""
    about = verify(folder)
    try:
        if "format" not in about:
            tensors = transformers_folder.tensors(folder, ModelConfig.from_dict(about["model_config"]))
        else:
            with TensorFile(folder / _WEIGHTS) as file:
                tensors = {name: file.read(name) for name in file.tensors}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / _WEIGHTS}: {error}") from error
    targets = dict(model.named_parameters())
    if targets.keys() != tensors.keys():
        raise CheckpointError(f"{folder} holds other weights: {sorted(targets.keys() ^ tensors.keys())}")
    for name, target in targets.items():
        if (tensors[name].dtype, tensors[name].shape) != (target.dtype, target.shape):
            raise CheckpointError(f"{folder}: {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}")
        with torch.no_grad():
            target.copy_(tensors[name])
