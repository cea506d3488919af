"""The models of transformers that can be split: where their code is, their mixers, and what these call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lasp.hf.loss import load_balancing_loss
from lasp.hf.operators import (
    Operator,
    convolution,
    gated_delta_rule,
    lightning_attention,
    no_shortcut,
    state_space_scan,
)

_CONVOLUTION = {"causal_conv1d_fn": convolution}
_GATED_DELTA = _CONVOLUTION | {"torch_chunk_gated_delta_rule": gated_delta_rule}
_KIMI_DELTA = _CONVOLUTION | {"chunk_kimi_delta_attention": gated_delta_rule}
_STATE_SPACE = _CONVOLUTION | {"mamba2_chunk_scan": state_space_scan}
# Functions that a mixer tries first, and need not call.
OPTIONAL: Mapping[str, Operator] = {"mamba2_split_conv1d_scan_combined": no_shortcut}
# Functions that no mixer calls but the model, of what its layers have gathered.
OF_MODEL: Mapping[str, Operator] = {"load_balancing_loss_func": load_balancing_loss}


class ModelFamily(NamedTuple):
    """The code of some model types.

    Attributes:
        file: of transformers.models, that has it.
        types: `model_type` of configurations.
        mixers: classes of layers whose tokens see others, with the functions of the file that carry what they see.
        attention: classes of softmax layers, which ask transformers for an attention function.
    """

    file: str
    types: tuple[str, ...]
    mixers: Mapping[str, Mapping[str, Operator]]
    attention: tuple[str, ...] = ()


def _family(folder: str, prefix: str, mixers: Mapping[str, Mapping[str, Operator]], *other_types: str) -> ModelFamily:
    """Returns that of a folder of transformers.models, whose classes begin with `prefix`."""
    return ModelFamily(
        f"{folder}.modeling_{folder}",
        (folder, *other_types),
        {prefix + name: functions for name, functions in mixers.items()},
        (f"{prefix}Attention",) if prefix else (),
    )


FAMILIES = (
    # Gated DeltaNet
    _family("qwen3_next", "Qwen3Next", {"GatedDeltaNet": _GATED_DELTA}),
    _family("qwen3_5", "Qwen3_5", {"GatedDeltaNet": _GATED_DELTA}, "qwen3_5_text"),
    _family("qwen3_5_moe", "Qwen3_5Moe", {"GatedDeltaNet": _GATED_DELTA}, "qwen3_5_moe_text"),
    _family("olmo_hybrid", "OlmoHybrid", {"GatedDeltaNet": _GATED_DELTA}),
    _family("lara_mini", "LaraMini", {"GatedDeltaNet": _GATED_DELTA}),
    # Kimi delta attention
    _family("kimi_linear", "KimiLinear", {"DeltaAttention": _KIMI_DELTA}),
    _family("bailing_hybrid", "BailingHybrid", {"DeltaAttention": _KIMI_DELTA}),
    # Mamba-2
    _family("mamba2", "", {"Mamba2Mixer": _STATE_SPACE}),
    _family("bamba", "Bamba", {"Mixer": _STATE_SPACE}),
    _family("nemotron_h", "NemotronH", {"Mamba2Mixer": _STATE_SPACE}),
    _family("granitemoehybrid", "GraniteMoeHybrid", {"MambaLayer": _STATE_SPACE}),
    _family("falcon_h1", "FalconH1", {"Mixer": _STATE_SPACE}),
    _family("zamba2", "Zamba2", {"MambaMixer": _STATE_SPACE}),
    # lightning attention
    _family("minimax", "MiniMax", {"LightningAttention": {"MiniMaxLightningAttention.forward": lightning_attention}}),
    # short convolutions
    _family("lfm2", "Lfm2", {"ShortConv": _CONVOLUTION}),
    _family("lfm2_moe", "Lfm2Moe", {"ShortConv": _CONVOLUTION}),
    _family("lfm3", "Lfm3", {"ShortConv": _CONVOLUTION}),
)
# Where TRL takes the loss of routers from, whatever the model.
SHARED_LOSSES = ModelFamily("mixtral.modeling_mixtral", (), {})
TYPES: Mapping[str, ModelFamily] = {name: family for family in FAMILIES for name in family.types}
PACKAGE = "transformers.models."


class LayerKind(NamedTuple):
    """A known layer whose tokens see others. functions: that it must call; none for a softmax layer."""

    family: ModelFamily
    functions: Mapping[str, Operator]

    @property
    def is_attention(self) -> bool:
        return not self.functions


def kind_of(layer: object) -> LayerKind | None:
    """The kind of a module, also of FSDP's subclass of its class; None if its tokens see no others."""
    for base in type(layer).__mro__:
        for family in FAMILIES:
            if base.__module__ == PACKAGE + family.file:
                if base.__name__ in family.attention:
                    return LayerKind(family, {})
                if base.__name__ in family.mixers:
                    return LayerKind(family, family.mixers[base.__name__])
    return None
