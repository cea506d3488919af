"""Causal language models over linear attention."""

from lasp.models.causal_lm import Cache, CausalLM, LMOutput
from lasp.models.config import ModelConfig, from_settings
from lasp.models.presets import NAMES, SIZES, preset, sizes
from lasp.models.table import mixer_table, num_parameters, parameter_table

__all__ = [
    "NAMES",
    "SIZES",
    "Cache",
    "CausalLM",
    "LMOutput",
    "ModelConfig",
    "from_settings",
    "mixer_table",
    "num_parameters",
    "parameter_table",
    "preset",
    "sizes",
]
