"""Published models by name and size. Where each number comes from stands in docs/models.md."""

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
}

_VOCABULARIES = {"tiny": BYTE_VOCABULARY, "0.4b": 50272, "1b": 64000, "7b": 64000}

NAMES = tuple(_KINDS)
SIZES = tuple(_VOCABULARIES)


def preset(name: str, size: str, **overrides: Any) -> ModelConfig:
    """The configuration of a published model.

    Args:
        name: "linear-transformer", "transnormer" or "retnet".
        size: "tiny" (bytes, under 1M parameters), "0.4b", "1b" or "7b".
        overrides: any field of ModelConfig, above all `vocab_size`.

    Raises:
        ValueError: unknown name, size or field, or a combination ModelConfig refuses.
    """
    if name not in _KINDS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(NAMES)}")
    if size not in _VOCABULARIES:
        raise ValueError(f"unknown size {size!r} of {name}; known: {', '.join(SIZES)}")
    unknown = sorted(set(overrides) - set(ModelConfig.__dataclass_fields__))
    if unknown:
        known = ", ".join(ModelConfig.__dataclass_fields__)
        raise ValueError(f"ModelConfig has no field {', '.join(unknown)}; it has {known}")
    d_model, num_layers, num_heads, key_dim, value_dim, ffn_dim = _SHAPES[name][size]
    values: dict[str, Any] = dict(
        vocab_size=_VOCABULARIES[size],
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        ffn_dim=ffn_dim,
        **_KINDS[name],
    )
    if size == "tiny" and name != "retnet":
        values["init_std"] = d_model**-0.5  # 0.02 is about 2048 ** -0.5: too small a start at this width
    return ModelConfig(**{**values, **overrides})
