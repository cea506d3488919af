"""Published models by name and size. Where each number comes from stands in docs/design/models.md."""

from __future__ import annotations

from typing import Any

from lasp.models.config import ModelConfig

BYTE_VOCABULARY = 257  # 256 bytes and the end of a document

# What makes the model, at any size.
_KINDS: dict[str, dict[str, Any]] = {
    "linear-transformer": {
        "feature_map": "elu+1",
        "positions": "sinusoidal",
        "normalization": "denominator",
        "ffn": "gelu",
        "norm": "layernorm",
        "scale_embeddings": True,
    },
    "transnormer": {
        "feature_map": "silu",
        "positions": "lrpe",
        "positions_in": "first",
        "decay": "transnormer",
        "normalization": "hidden",
        "gate": "linear",
        "scale_scores": False,
        "ffn": "sglu",
        "norm": "simple_rmsnorm",
        "norm_eps": 1e-8,
        "scale_embeddings": True,
    },
    "retnet": {
        "positions": "rotary",
        "decay": "retnet",
        "normalization": "head",
        "gate": "silu",
        "ffn": "gelu",
        "norm": "rmsnorm",
        "scale_embeddings": True,
        "init": "xavier",
    },
    "gla": {"mixer": "gla", "norm_eps": 1e-5, "tied_embeddings": False},
    "deltanet": {"mixer": "deltanet", "norm_eps": 1e-5, "tied_embeddings": False},
    "gated-deltanet": {"mixer": "gated-deltanet", "norm_eps": 1e-5, "tied_embeddings": False},
    "kda": {"mixer": "kda", "norm_eps": 1e-5, "tied_embeddings": False},
    "mamba2": {"mixer": "mamba2", "num_key_heads": 1, "ffn": "none", "norm_eps": 1e-5},
    "hybrid": {
        "layer_pattern": "LLLN",
        "positions": "rotary",
        "decay": "retnet",
        "normalization": "head",
        "gate": "silu",
        "norm_eps": 1e-5,
    },
}

# d_model, num_layers, num_heads, key_dim, value_dim, ffn_dim
_SHAPES: dict[str, dict[str, tuple[int, int, int, int, int, int]]] = {
    "linear-transformer": {
        "tiny": (128, 4, 4, 32, 32, 512),
        "0.4b": (1024, 24, 8, 128, 128, 4096),
        "1b": (2048, 16, 16, 128, 128, 8192),
        "7b": (4096, 30, 32, 128, 128, 16384),
    },
    "transnormer": {
        "tiny": (128, 4, 4, 32, 32, 352),
        "0.4b": (1024, 24, 8, 128, 128, 2816),
        "1b": (2048, 16, 16, 128, 128, 5632),
        "7b": (4096, 30, 32, 128, 128, 11008),
    },
    "retnet": {
        "tiny": (128, 4, 4, 32, 64, 256),
        "0.4b": (1024, 24, 4, 256, 512, 2048),
        "1b": (2048, 24, 8, 256, 512, 4096),
        "7b": (4096, 32, 16, 256, 512, 8192),
    },
    "gla": {
        "tiny": (128, 4, 4, 16, 32, 352),
        "0.4b": (1024, 24, 4, 128, 256, 2816),
        "1b": (2048, 24, 4, 256, 512, 5632),
    },
    "deltanet": {"tiny": (128, 4, 4, 32, 32, 352), "1b": (2048, 24, 16, 128, 128, 5632)},
    "gated-deltanet": {"tiny": (128, 4, 3, 32, 64, 256), "1b": (2048, 21, 6, 256, 512, 5632)},
    "kda": {"tiny": (128, 4, 4, 32, 32, 320)},
    "mamba2": {
        "tiny": (128, 8, 8, 32, 32, 0),
        "0.4b": (1024, 48, 32, 128, 64, 0),
        "1b": (2048, 48, 64, 128, 64, 0),
    },
    "hybrid": {"tiny": (128, 4, 4, 32, 32, 352), "1b": (2048, 16, 32, 64, 64, 8192)},
}

# Key and value heads of softmax layers.
_KV_HEADS = {"hybrid": {"tiny": 1, "1b": 8}}

# The authors' published models have one vocabulary for all sizes of a family, but for the first three here.
_VOCABULARIES = {"tiny": BYTE_VOCABULARY, "0.4b": 50272, "1b": 64000, "7b": 64000}
_OWN_VOCABULARIES = {"gla": 32000, "deltanet": 32000, "gated-deltanet": 32000, "mamba2": 50288, "hybrid": 128256}

NAMES = tuple(_KINDS)


def sizes(name: str) -> tuple[str, ...]:
    """The sizes of a family."""
    if name not in _SHAPES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(NAMES)}")
    return tuple(_SHAPES[name])


def preset(name: str, size: str, **overrides: Any) -> ModelConfig:
    """The configuration of a published model.

    Args:
        name: one of NAMES.
        size: one of `sizes(name)`: "tiny" (bytes, under 1M parameters), "0.4b", "1b" or "7b".
        overrides: any field of ModelConfig, above all `vocab_size`.

    Raises:
        ValueError: unknown name, size or field, or a combination ModelConfig refuses.
    """
    if size not in sizes(name):
        raise ValueError(f"unknown size {size!r} of {name}; known: {', '.join(sizes(name))}")
    unknown = sorted(set(overrides) - set(ModelConfig.__dataclass_fields__))
    if unknown:
        known = ", ".join(ModelConfig.__dataclass_fields__)
        raise ValueError(f"ModelConfig has no field {', '.join(unknown)}; it has {known}")
    d_model, num_layers, num_heads, key_dim, value_dim, ffn_dim = _SHAPES[name][size]
    values: dict[str, Any] = dict(
        vocab_size=BYTE_VOCABULARY if size == "tiny" else _OWN_VOCABULARIES.get(name, _VOCABULARIES[size]),
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        ffn_dim=ffn_dim,
        **_KINDS[name],
    )
    if name in _KV_HEADS:
        values["num_kv_heads"] = _KV_HEADS[name][size]
    if size == "tiny":
        values["tied_embeddings"] = True
    if size == "tiny" and name != "retnet":
        values["init_std"] = d_model**-0.5  # 0.02 is about 2048 ** -0.5: too small a start at this width
    return ModelConfig(**{**values, **overrides})
