"""Tables of what is registered, in Markdown: docs/tables.py puts them into the docs."""

from __future__ import annotations

import dataclasses

import torch

from lasp.layers import MIXERS, LayerContext, MixerConfig
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
            first = c.mixer_of(0)
            shape = (c.d_model, c.num_layers, first.num_heads, first.key_dim, first.value_dim, c.ffn_dim, c.vocab_size)
            cells = [name, size, *map(str, shape), f"{num_parameters(c):,}"]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


# Numbers of a transition that cross ranks beside the state, by the operator's decay.
_BESIDE = {"none": "", "constant": " + 1", "head": " + 1", "channel": " + K"}


def mixer_table() -> str:
    """A Markdown table with a row per mixer: what crosses ranks, and the settings that not all mixers have."""
    rows = ["| mixer | layer | a head's state crosses ranks as | halo | settings |", "|---|---|---|---|---|"]
    common = {field.name for field in dataclasses.fields(MixerConfig)}
    for name, (kind, settled) in MIXERS.items():
        config = kind(num_heads=2, key_dim=4, value_dim=4, **settled)
        cost = config.cost(LayerContext(8))
        operator = cost.operator
        crosses = "keys and values" if config.rule == "softmax" else f"KV{_BESIDE[operator.decay]}"
        if operator.rule == "delta":
            crosses = "KV + K^2"
        halo = f"{cost.conv_width - 1} tokens" if cost.convolved else "none"
        settings = [f"{key} = {value}" for key, value in config.to_dict().items() if key not in (*common, "kind")]
        rows.append(f"| {name} | {config.layer.__name__} | {crosses} | {halo} | {', '.join(settings)} |")
    return "\n".join(rows)
