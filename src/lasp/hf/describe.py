"""Tells people what a parallelized model does with each of its layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lasp.hf.attention import FUNCTION
from lasp.hf.hooks import MixerEnters, hooks_of
from lasp.hf.latents import has_latents
from lasp.hf.operators import convolution, gated_delta_rule, lightning_attention, state_space_scan
from lasp.hf.split import ModelSplit
from lasp.hf.table import kind_of

_OPERATORS = {
    convolution: "short_convolution",
    gated_delta_rule: "delta_rule",
    state_space_scan: "linear_attention",
    lightning_attention: "linear_attention",
}


class LayerReport(NamedTuple):
    """A layer whose tokens see others.

    Attributes:
        name: of the module.
        layer: its class.
        functions: of transformers, in whose place this library's operators run.
        operators: those.
        exchange: what crosses the ranks, and how.
    """

    name: str
    layer: str
    functions: tuple[str, ...]
    operators: tuple[str, ...]
    exchange: str


def describe(model: nn.Module) -> list[LayerReport]:
    """A report on every layer that is split.

    Raises:
        ValueError: the model is not parallelized.
    """
    hooks = [hook for hook in hooks_of(model) if isinstance(hook, MixerEnters)]
    if not hooks:
        raise ValueError("describe tells of a model that is parallelized: lasp.hf.parallelize(model, sp) first")
    return [_report(hook, model.get_submodule(hook.name)) for hook in hooks]


def _report(hook: MixerEnters, layer: nn.Module) -> LayerReport:
    kind = kind_of(layer)
    assert kind is not None
    if kind.is_attention:
        exchange = _of_attention(hook.split, layer)
        return LayerReport(hook.name, type(layer).__name__, (FUNCTION,), ("softmax_attention",), exchange)
    operators = tuple(_OPERATORS[operator] for operator in kind.functions.values())
    return LayerReport(
        hook.name, type(layer).__name__, tuple(kind.functions), operators, _of_recurrence(hook.split, operators)
    )


def _of_attention(split: ModelSplit, layer: nn.Module) -> str:
    if split.sp is None or split.sp.size == 1:
        return "none"
    if split.gathers_latents and has_latents(layer):
        return "latents of keys and values, all_gather"
    config = getattr(layer, "config", None)
    window = getattr(layer, "sliding_window", None)
    method = split.method(getattr(config, "num_attention_heads", 1), window)
    what = {"ulysses": "tokens for heads", "all_gather": "keys and values"}[method]
    return f"{what}, {method}" if window is None else f"{what} of a window of {window}, {method}"


def _of_recurrence(split: ModelSplit, operators: tuple[str, ...]) -> str:
    if split.sp is None or split.sp.size == 1:
        return "none"
    states = f"states, {split.sp.exchange.name}"
    rows = "last rows, to the next rank"
    return "; ".join(rows if operator == "short_convolution" else states for operator in operators)
