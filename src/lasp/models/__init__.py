"""Causal language models over linear attention."""

from lasp.models.causal_lm import Cache, CausalLM, LMOutput
from lasp.models.config import ModelConfig
from lasp.models.presets import NAMES, preset, sizes
from lasp.models.table import num_parameters, parameter_table

__all__ = [
    "NAMES",
    "Cache",
    "CausalLM",
    "LMOutput",
    "ModelConfig",
    "num_parameters",
    "parameter_table",
    "preset",
    "sizes",
]
