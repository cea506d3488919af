"""The sequence mixers a block can have, each made from the configuration."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lasp.layers import DeltaNet, GatedLinearAttention, LinearAttention, Mamba2, SoftmaxAttention
from lasp.models.config import ModelConfig


def _linear_attention(config: ModelConfig, layer: int) -> nn.Module:
    return LinearAttention(
        d_model=config.d_model,
        num_heads=config.num_heads,
        key_dim=config.key_dim,
        value_dim=config.value_dim,
        feature_map=config.feature_map,
        positions=config.layer_positions(layer),
        log_decay=config.layer_log_decay(layer),
        normalization=config.normalization,
        gate=config.gate,
        scale=config.key_dim**-0.5 if config.scale_scores else 1.0,
        norm_eps=config.norm_eps,
        backend=config.backend,
    )


def _gla(config: ModelConfig, layer: int) -> nn.Module:
    return GatedLinearAttention(
        d_model=config.d_model,
        num_heads=config.num_heads,
        key_dim=config.key_dim,
        value_dim=config.value_dim,
        norm_eps=config.norm_eps,
        backend=config.backend,
    )


def _delta(decay: str, output_gate: str, low_rank_gate: bool = False) -> Callable[[ModelConfig, int], nn.Module]:
    return lambda config, layer: DeltaNet(
        d_model=config.d_model,
        num_heads=config.num_heads,
        key_dim=config.key_dim,
        value_dim=config.value_dim,
        num_key_heads=config.num_key_heads,
        decay=decay,
        output_gate=output_gate,
        gate_rank=config.value_dim if low_rank_gate else None,
        negative_eigenvalues=config.negative_eigenvalues,
        conv_width=config.conv_width,
        norm_eps=config.norm_eps,
        backend=config.backend,
    )


def _mamba2(config: ModelConfig, layer: int) -> nn.Module:
    return Mamba2(
        d_model=config.d_model,
        num_heads=config.num_heads,
        head_dim=config.value_dim,
        state_dim=config.key_dim,
        num_groups=config.num_key_heads or config.num_heads,
        conv_width=config.conv_width,
        norm_eps=config.norm_eps,
        backend=config.backend,
    )


def _softmax(config: ModelConfig) -> nn.Module:
    return SoftmaxAttention(
        d_model=config.d_model,
        num_heads=config.num_heads,
        key_dim=config.key_dim,
        value_dim=config.value_dim,
        num_kv_heads=config.num_kv_heads,
        rotary=config.softmax_rotary,
        method=config.softmax_method,
        # Other names are backends of recurrences only.
        backend="reference" if config.backend == "reference" else "auto",
    )


MIXERS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {
    "linear-attention": _linear_attention,
    "gla": _gla,
    "deltanet": _delta("none", "none"),
    "gated-deltanet": _delta("head", "silu"),
    "kda": _delta("channel", "sigmoid", low_rank_gate=True),
    "mamba2": _mamba2,
}


def mixer(config: ModelConfig, layer: int) -> nn.Module:
    """The mixer of layer `layer` (from 0): x [B, T, D] -> y [B, T, D] and its state."""
    return _softmax(config) if config.is_softmax(layer) else MIXERS[config.mixer](config, layer)
