"""Layers of other libraries in the place of this one's mixers, with the same model, optimizer and loss around them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lasp.models import CausalLM, ModelConfig


class OtherMixer(nn.Module):
    """Another library's layer, called as a mixer is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y, None


def _fla(family: str, config: ModelConfig, mixer: Any, layer: int) -> nn.Module:
    layers = importlib.import_module("fla.layers")
    shared = {"hidden_size": config.d_model, "num_heads": mixer.num_heads, "layer_idx": layer}
    keys, values = mixer.num_heads * mixer.key_dim, mixer.num_heads * mixer.value_dim
    expanded = {"expand_k": keys / config.d_model, "expand_v": values / config.d_model}
    wider = {"head_dim": mixer.key_dim, "expand_v": mixer.value_dim / mixer.key_dim}
    made: dict[str, Callable[[], nn.Module]] = {
        "retnet": lambda: layers.MultiScaleRetention(**shared, **expanded),
        "gla": lambda: layers.GatedLinearAttention(**shared, **expanded),
        "deltanet": lambda: layers.DeltaNet(**shared, **expanded),
        "gated-deltanet": lambda: layers.GatedDeltaNet(**shared, **wider),
        "kda": lambda: layers.KimiDeltaAttention(**shared, **wider),
        "mamba2": lambda: layers.Mamba2(
            **shared, head_dim=mixer.value_dim, state_size=mixer.key_dim, expand=values // config.d_model
        ),
    }
    return made[family]()


def _transformers(family: str, config: ModelConfig, mixer: Any, layer: int) -> nn.Module:
    if family == "mamba2":
        mamba2 = importlib.import_module("transformers.models.mamba2")
        of_mamba2 = mamba2.Mamba2Config(
            hidden_size=config.d_model, num_heads=mixer.num_heads, head_dim=mixer.value_dim,
            state_size=mixer.key_dim, n_groups=mixer.groups, num_hidden_layers=config.num_layers,
        )  # fmt: skip
        made: nn.Module = importlib.import_module("transformers.models.mamba2.modeling_mamba2").Mamba2Mixer(
            of_mamba2, layer_idx=layer
        )
        return made
    qwen = importlib.import_module("transformers.models.qwen3_next")
    of_qwen = qwen.Qwen3NextConfig(
        hidden_size=config.d_model, num_hidden_layers=config.num_layers, linear_num_key_heads=mixer.key_heads,
        linear_num_value_heads=mixer.num_heads, linear_key_head_dim=mixer.key_dim,
        linear_value_head_dim=mixer.value_dim,
    )  # fmt: skip
    modeling = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    layer_made: nn.Module = modeling.Qwen3NextGatedDeltaNet(of_qwen, layer)
    return layer_made


LAYERS: dict[str, tuple[Callable[[str, ModelConfig, Any, int], nn.Module], tuple[str, ...]]] = {
    "fla": (_fla, ("retnet", "gla", "deltanet", "gated-deltanet", "kda", "mamba2")),
    "transformers": (_transformers, ("gated-deltanet", "mamba2")),
}


def replace_mixers(model: CausalLM, family: str, library: str) -> None:
    """Put the library's layers in the place of the model's linear mixers.

    Raises:
        KeyError: it has none for the family. ImportError: the library is not there.
    """
    make, families = LAYERS[library]
    if family not in families:
        raise KeyError(f"{library} has no layer like {family}'s")
    device = next(model.parameters()).device
    for number, block in enumerate(model.blocks):
        mixer = model.config.mixer_of(number)
        if mixer.rule != "softmax":
            block.attention = OtherMixer(make(family, model.config, mixer, number)).to(device)
