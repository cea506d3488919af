"""A model's numbers by layer, from its configuration alone: parameters, matrix products, states.

D width, H heads, K and V channels of a head, F feed-forward width; G key heads. tests/analysis compares parameters
with the built models.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from lasp.exchange.payload import Payload
from lasp.models.config import ModelConfig

GLA_GATE_RANK = 16


class Layer(NamedTuple):
    """One layer.

    Attributes:
        mixer_matrices, ffn_matrices: numbers in matrices that every token is multiplied with.
        other: other parameters: norms, convolutions, decays, positions.
        inputs: matrices that read the mixer's normalised input, and `ffn_inputs` the feed-forward layer's.
        keys, values: K and V as the recurrence sees them. heads, key_heads: H and G.
        transition: numbers of a head's transition: 0, 1, K or K * K. None for softmax attention.
        convolved: channels of the short convolution; 0 for none.
        gates: channels of output gates, decays and betas, which an all-to-all has to move as well.
    """

    mixer_matrices: int
    ffn_matrices: int
    other: int
    inputs: int
    ffn_inputs: int
    keys: int
    values: int
    heads: int
    key_heads: int
    transition: int | None
    convolved: int
    gates: int

    @property
    def parameters(self) -> int:
        return self.mixer_matrices + self.ffn_matrices + self.other

    def load(self, batch: int) -> Payload:
        """What the exchange of the layer's state carries, for `batch` sequences."""
        assert self.transition is not None, "a softmax layer has no state to exchange"
        return Payload(batch * self.heads, self.keys, self.values, self.transition)


@lru_cache(maxsize=4096)
def layer(config: ModelConfig, index: int) -> Layer:
    """Layer `index` (from 0).

    Raises:
        ValueError: its mixer is not known here.
    """
    ffn_inputs = {"sglu": 2, "swiglu": 2, "gelu": 1, "relu": 1, "none": 0}[config.ffn]
    ffn = (ffn_inputs + 1) * config.d_model * config.ffn_dim if ffn_inputs else 0
    norms = (1 + (ffn_inputs > 0)) * _norm(config)
    if config.is_softmax(index):
        mixer = _softmax(config)
    else:
        kinds = {"linear-attention": _linear, "gla": _gla, "mamba2": _mamba2}
        deltas = ("deltanet", "gated-deltanet", "kda")
        if config.mixer not in (*kinds, *deltas):
            raise ValueError(f"no analysis of mixer {config.mixer!r}; known: {', '.join((*kinds, *deltas))}")
        mixer = kinds[config.mixer](config, index) if config.mixer in kinds else _delta(config)
    return mixer._replace(ffn_matrices=ffn, ffn_inputs=ffn_inputs, other=mixer.other + norms)


def layers(config: ModelConfig) -> list[Layer]:
    return [layer(config, index) for index in range(config.num_layers)]


def embedding_parameters(config: ModelConfig) -> int:
    """Embedding, final norm, and the output projection where it is not tied."""
    tables = 1 if config.tied_embeddings else 2
    return tables * config.vocab_size * config.d_model + _norm(config)


def num_parameters(config: ModelConfig) -> int:
    """Trainable numbers, as `lasp.models.num_parameters`, without building the model."""
    return embedding_parameters(config) + sum(each.parameters for each in layers(config))


def _norm(config: ModelConfig) -> int:
    return {"simple_rmsnorm": 0, "rmsnorm": config.d_model, "layernorm": 2 * config.d_model}[config.norm]


def _of(config: ModelConfig, matrices: int, other: int, inputs: int, **rest: int | None) -> Layer:
    values: dict[str, int | None] = {
        "keys": config.key_dim,
        "values": config.value_dim,
        "heads": config.num_heads,
        "key_heads": config.num_heads,
        "transition": 0,
        "convolved": 0,
        "gates": 0,
    }
    return Layer(matrices, 0, other, inputs, 0, **{**values, **rest})  # type: ignore[arg-type]


def _linear(config: ModelConfig, index: int) -> Layer:
    d, keys, values = config.d_model, config.num_heads * config.key_dim, config.num_heads * config.value_dim
    gated = config.gate != "none"
    hedgehog, lrpe = config.feature_map == "hedgehog", config.layer_positions(index) == "lrpe"
    maps = 2 * keys * config.key_dim if hedgehog else 0
    key_dim = config.key_dim * (2 if hedgehog else 1)
    positions = config.num_heads * key_dim if lrpe else 0
    return _of(
        config,
        d * (2 * keys + (2 + gated) * values) + maps,
        positions,
        3 + gated,
        keys=key_dim * (2 if lrpe else 1),
        values=config.value_dim + (config.normalization == "denominator"),
        transition=0 if config.decay == "none" else 1,
        gates=values if gated else 0,
    )


def _gla(config: ModelConfig, index: int) -> Layer:
    d, keys, values = config.d_model, config.num_heads * config.key_dim, config.num_heads * config.value_dim
    matrices = d * (2 * keys + 3 * values) + GLA_GATE_RANK * (d + keys)
    return _of(config, matrices, keys + config.value_dim, 5, transition=config.key_dim, gates=values + keys)


def _delta(config: ModelConfig) -> Layer:
    d, heads, key_heads = config.d_model, config.num_heads, config.num_key_heads or config.num_heads
    keys, values = key_heads * config.key_dim, heads * config.value_dim
    convolved = 2 * keys + values
    matrices = d * (convolved + values + heads)
    other, inputs, gates = convolved * config.conv_width + config.value_dim, 4, heads
    if config.mixer == "gated-deltanet":
        matrices += d * (heads + values)
        other, inputs, gates = other + 2 * heads, inputs + 2, gates + heads + values
    elif config.mixer == "kda":
        channels, rank = heads * config.key_dim, config.value_dim
        matrices += rank * (d + channels) + rank * (d + values)
        other, inputs, gates = other + heads + channels + values, inputs + 2, gates + channels + values
    return _of(
        config, matrices, other, inputs, key_heads=key_heads, transition=config.key_dim**2, convolved=convolved,
        gates=gates,
    )  # fmt: skip


def _mamba2(config: ModelConfig, index: int) -> Layer:
    groups = config.num_key_heads or config.num_heads
    inner, shared = config.num_heads * config.value_dim, groups * config.key_dim
    convolved = inner + 2 * shared
    matrices = config.d_model * (inner + convolved + config.num_heads + inner)
    other = convolved * (config.conv_width + 1) + 3 * config.num_heads + inner
    return _of(
        config, matrices, other, 1, key_heads=groups, transition=1, convolved=convolved,
        gates=inner + config.num_heads,
    )  # fmt: skip


def _softmax(config: ModelConfig) -> Layer:
    key_heads = config.num_kv_heads or config.num_heads
    read = config.num_heads * config.key_dim + key_heads * (config.key_dim + config.value_dim)
    matrices = config.d_model * (read + config.num_heads * config.value_dim)
    return _of(config, matrices, 0, 3, key_heads=key_heads, transition=None)
