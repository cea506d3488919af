"""The models of transformers that can be split: where their code is, their mixers, and what these call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lasp.hf.loss import load_balancing_loss
from lasp.hf.operators import Operator, convolution, gated_delta_rule, no_shortcut, state_space_scan

_CONVOLUTION = {"causal_conv1d_fn": convolution}
_GATED_DELTA = _CONVOLUTION | {"torch_chunk_gated_delta_rule": gated_delta_rule}
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


FAMILIES = (
    ModelFamily(
        "qwen3_next.modeling_qwen3_next",
        ("qwen3_next",),
        {"Qwen3NextGatedDeltaNet": _GATED_DELTA},
        ("Qwen3NextAttention",),
    ),
    ModelFamily(
        "qwen3_5.modeling_qwen3_5",
        ("qwen3_5", "qwen3_5_text"),
        {"Qwen3_5GatedDeltaNet": _GATED_DELTA},
        ("Qwen3_5Attention",),
    ),
    ModelFamily("mamba2.modeling_mamba2", ("mamba2",), {"Mamba2Mixer": _STATE_SPACE}),
    ModelFamily("bamba.modeling_bamba", ("bamba",), {"BambaMixer": _STATE_SPACE}, ("BambaAttention",)),
    ModelFamily(
        "nemotron_h.modeling_nemotron_h",
        ("nemotron_h",),
        {"NemotronHMamba2Mixer": _STATE_SPACE},
        ("NemotronHAttention",),
    ),
    ModelFamily(
        "granitemoehybrid.modeling_granitemoehybrid",
        ("granitemoehybrid",),
        {"GraniteMoeHybridMambaLayer": _STATE_SPACE},
        ("GraniteMoeHybridAttention",),
    ),
)
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
