"""Parameter counts of the presets, without allocating them."""

from __future__ import annotations

import torch

from lasp.models.causal_lm import CausalLM
from lasp.models.config import ModelConfig
from lasp.models.presets import NAMES, preset, sizes


def num_parameters(config: ModelConfig) -> int:
    """Trainable numbers of a model, a tied embedding counted once. Built on the meta device: no memory."""
    with torch.device("meta"):
        model = CausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_table() -> str:
    """A Markdown table with a row per preset and size."""
    rows = [
        "| preset | size | d_model | layers | heads | K | V | ffn | vocabulary | parameters |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        for size in sizes(name):
            c = preset(name, size)
            shape = (c.d_model, c.num_layers, c.num_heads, c.key_dim, c.value_dim, c.ffn_dim, c.vocab_size)
            cells = [name, size, *map(str, shape), f"{num_parameters(c):,}"]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
