"""A Mamba-2 model as a folder of Hugging Face transformers, which its AutoModelForCausalLM loads; and back.

config.json, model.safetensors, tokenizer.json and tokenizer_config.json, written without that library. The two differ
in names, and in a dim of the convolution's weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lasp import files
from lasp.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, FileTokenizer, Tokenizer, files_of
from lasp.errors import CheckpointError, ConfigError
from lasp.layers.mamba2 import Mamba2
from lasp.models import CausalLM, ModelConfig
from lasp.models.presets import preset
from lasp.train.checkpoint.tensor_file import TensorFile

CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TYPE = "mamba2"
_CONVOLUTION = "mixer.conv1d.weight"
_OF_BLOCK = {
    "attention_norm.weight": "norm.weight",
    "attention.in_proj.weight": "mixer.in_proj.weight",
    "attention.convolution.weight": _CONVOLUTION,
    "attention.convolution.bias": "mixer.conv1d.bias",
    "attention.decay.log_rate": "mixer.A_log",
    "attention.decay.bias": "mixer.dt_bias",
    "attention.skip": "mixer.D",
    "attention.gain": "mixer.norm.weight",
    "attention.out_proj.weight": "mixer.out_proj.weight",
}
# What a configuration may say that this library's layer does not do, and what it must say, also by default.
_SETTLED: Mapping[str, Any] = {
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "time_step_limit": (0.0, float("inf")),
}


# Where B and C have groups, the layer's outputs are normalized group by group, as in the paper's own code.
NEWER = "transformers computes them from 5.23 on; until 5.22 it normalizes the outputs of all groups together"


def needs_newer(config: ModelConfig) -> bool:
    """Returns whether some versions of transformers compute another model of the same files."""
    return isinstance(config.mixer, Mamba2.Config) and config.mixer.groups > 1


def names(config: ModelConfig) -> dict[str, str]:
    """transformers' names of the parameters, by this library's."""
    found = {"embedding.weight": "backbone.embeddings.weight", "final_norm.weight": "backbone.norm_f.weight"}
    if not config.tied_embeddings:
        found["head.weight"] = "lm_head.weight"
    for layer in range(config.num_layers):
        found |= {f"blocks.{layer}.{ours}": f"backbone.layers.{layer}.{theirs}" for ours, theirs in _OF_BLOCK.items()}
    return found


def check(config: ModelConfig) -> None:
    """Raise ConfigError for a model that transformers does not have."""
    mixer = config.mixer
    wanted = {"ffn": "none", "norm": "rmsnorm", "positions": "none", "scale_embeddings": False}
    others = [f"{name} {getattr(config, name)!r}" for name, value in wanted.items() if getattr(config, name) != value]
    if not isinstance(mixer, Mamba2.Config):
        kinds = ", ".join(sorted({each.to_dict()["kind"] for each in config.mixers}))
        raise ConfigError(f"--format transformers takes models of the family mamba2, this one has layers of {kinds}")
    if others:
        raise ConfigError(f"transformers' Mamba-2 has no {', '.join(others)}")
    if mixer.num_heads * mixer.value_dim % config.d_model:
        raise ConfigError(
            f"transformers' Mamba-2 is a whole number of times as wide inside as outside: num_heads * value_dim "
            f"{mixer.num_heads * mixer.value_dim} is no multiple of d_model {config.d_model}"
        )


def write(folder: Path, model: CausalLM, tokenizer: Tokenizer) -> None:
    """Write the files. The model has passed `check`."""
    config = model.config
    mixer = config.mixer
    assert isinstance(mixer, Mamba2.Config)
    separator = tokenizer.separator
    about = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": _TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_heads": mixer.num_heads,
        "head_dim": mixer.value_dim,
        "state_size": mixer.key_dim,
        "n_groups": mixer.groups,
        "expand": mixer.num_heads * mixer.value_dim // config.d_model,
        "conv_kernel": mixer.conv_width,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "bos_token_id": separator,
        "eos_token_id": separator,
        "pad_token_id": separator,
        "dtype": "float32",
    }
    named = names(config)
    tensors = {named[name]: _theirs(named[name], p.detach()) for name, p in model.named_parameters()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    beside = files_of(tokenizer) or {TOKENIZER_FILE: byte_tokenizer()}
    text = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.content is None:
        text |= {"eos_token": _SEPARATOR, "pad_token": _SEPARATOR}
    for name, content in beside.items():
        files.write(folder / name, content)
    files.write(folder / "tokenizer_config.json", json.dumps(text, indent=1) + "\n")
    files.write(folder / CONFIG, json.dumps(about, indent=1) + "\n")


def is_one(about: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is of transformers."""
    return "model_type" in about


def read(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Give what `export.read` does of our own export. Raises CheckpointError for another kind of model."""
    if config["model_type"] != _TYPE:
        raise CheckpointError(
            f"{folder} is of transformers' type {config['model_type']!r}: only {_TYPE!r} is read as a model of this "
            "library; others train as they are, by lasp.hf"
        )
    for name, value in _SETTLED.items():
        given = _plain(config.get(name, value))
        if given != value:
            raise CheckpointError(f"{folder} has {name} {given!r}, and this library's Mamba-2 has {value!r}")
    # Values by default as transformers has them, of which a config.json may say nothing.
    settings = {
        "vocab_size": config.get("vocab_size", 32768),
        "d_model": config.get("hidden_size", 4096),
        "num_layers": config.get("num_hidden_layers", 64),
        "num_heads": config.get("num_heads", 128),
        "value_dim": config.get("head_dim", 64),
        "key_dim": config.get("state_size", 128),
        "num_key_heads": config.get("n_groups", 8),
        "conv_width": config.get("conv_kernel", 4),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "tied_embeddings": config.get("tie_word_embeddings", False),
    }
    own = _tokenizer(folder)
    return {
        "step": 0,
        "tokenizer": TOKENIZER_FILE if own.content is not None else own.name,
        "tokenizer_id": own.name,
        "prompt": "",
        "model": {"family": "mamba2", "size": "tiny", "overrides": settings},
        "model_config": preset("mamba2", "tiny", **settings).to_dict(),
        "files": {},
    }


def tensors(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights in fp32, by this library's names. Raises CheckpointError, OSError or ValueError."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with TensorFile(path) as file:
            found |= {name: file.read(name) for name in file.tensors}
    given = names(config)
    if missing := sorted(set(given.values()) - found.keys()):
        raise CheckpointError(f"{folder} has no {', '.join(missing[:3])}{' ..' * (len(missing) > 3)}")
    return {ours: _ours(theirs, found[theirs]) for ours, theirs in given.items()}


def _theirs(name: str, tensor: Tensor) -> Tensor:
    return (tensor[:, None] if name.endswith(_CONVOLUTION) else tensor).contiguous()


def _ours(name: str, tensor: Tensor) -> Tensor:
    return (tensor[:, 0] if name.endswith(_CONVOLUTION) else tensor).float().contiguous()


def _plain(value: Any) -> Any:
    """A value of a config.json, which has tuples as lists and may have infinity as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {TOKENIZER_FILE}: save its tokenizer beside the model")
    return ByteTokenizer() if path.read_bytes() == byte_tokenizer() else FileTokenizer(path)


_SEPARATOR = "<|endoftext|>"


def byte_tokenizer() -> bytes:
    """tokenizer.json of a token per byte, and one more to separate documents, as this library's own has them."""
    # The characters by which tokenizers writes bytes, of which some are none that can be printed.
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    vocabulary = {chr(byte if byte in printed else next(others)): byte for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    added = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ByteTokenizer.separator, "content": _SEPARATOR, **added}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return (json.dumps(content, indent=1) + "\n").encode()
