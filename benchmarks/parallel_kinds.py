"""Recurrences, and layers of every family, over ranks or on one: the kinds that `sequence_parallel` measures."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import lasp
from lasp.exchange import Payload
from lasp.layers import FAMILIES
from lasp.models.presets import preset

SLOWEST_DECAY = 0.02  # of constant decays
STRONGEST_GATE = 0.1  # of gates per token, which average half of it
DELTA = "gated delta"

Method = Callable[..., Tensor]


class Shape(NamedTuple):
    heads: int
    head_dim: int
    tokens: tuple[int, ...]
    """Of a rank."""

    @property
    def d_model(self) -> int:
        return self.heads * self.head_dim


class Sample(NamedTuple):
    """A method's inputs, and the gradient of its output."""

    inputs: tuple[Tensor, ...]
    d_o: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        return Sample(tuple(function(x) for x in self.inputs), function(self.d_o))


class Kind(NamedTuple):
    """Something that is measured.

    Attributes:
        over: the method over the ranks of a group, or on this one alone.
        exact: the same on one device, of fp64 inputs.
        draw: inputs [1, n, ..] of so many tokens, by a generator.
        load: what crosses ranks, or None where an exchange by itself is not measured.
        parameters: those whose gradients are part of the work.
        heads: of values, of a delta rule.
    """

    over: Callable[[lasp.SequenceParallel | None], Method]
    exact: Method
    draw: Callable[[int, torch.Generator], Sample]
    load: Payload | None
    parameters: tuple[Tensor, ...] = ()
    heads: int = 0

    def sample(self, tokens: int, device: torch.device, seed: int = 0) -> Sample:
        return self.draw(tokens, torch.Generator(device).manual_seed(seed))


def names(shape: Shape) -> tuple[str, ...]:
    """All kinds: constant decay, delta rules with as many and four times as many heads of values, layers."""
    delta = (f"{DELTA} {shape.heads}/{heads}" for heads in (shape.heads, 4 * shape.heads))
    return "recurrence", "layer", *delta, *(f"{family} layer" for family in FAMILIES if family != "transnormer")


def kind_named(name: str, shape: Shape, device: torch.device, *, size: str = "1b") -> Kind:
    """The kind of one of `names`. size: the preset of other families' layers."""
    if name == "recurrence":
        return recurrence(shape, constant_decays(shape, device))
    if name.startswith(DELTA):
        return gated_delta(shape, int(name.rpartition("/")[2]))
    if name == "layer":
        dims = {"num_heads": shape.heads, "key_dim": shape.head_dim, "value_dim": shape.head_dim}
        load = Payload(shape.heads, shape.head_dim, shape.head_dim, 1)
        return whole_layer("transnormer", "1b", device, load, d_model=shape.d_model, **dims)
    return whole_layer(name.removesuffix(" layer"), size, device, None)


def constant_decays(shape: Shape, device: torch.device) -> Tensor:
    """Natural log-decays [H], of the recurrence with constant ones."""
    return -SLOWEST_DECAY * torch.linspace(0.1, 1.0, shape.heads, device=device)


def normal(*size: int, random: torch.Generator) -> Tensor:
    dtype = torch.bfloat16 if random.device.type == "cuda" else torch.float32
    return torch.randn(size, device=random.device, generator=random).to(dtype)


def recurrence(shape: Shape, log_decay: Tensor) -> Kind:
    """q, k, v [1, n, H, D] -> o [1, n, H, D], with constant decays [H]."""

    def over(sp: lasp.SequenceParallel | None) -> Method:
        return lambda q, k, v: lasp.linear_attention(q, k, v, log_decay, sp=sp)[0]

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lasp.linear_attention(q, k, v, log_decay, backend="torch")[0]

    def draw(tokens: int, random: torch.Generator) -> Sample:
        *inputs, d_o = (normal(1, tokens, shape.heads, shape.head_dim, random=random) for _ in range(4))
        return Sample(tuple(inputs), d_o)

    return Kind(over, exact, draw, Payload(shape.heads, shape.head_dim, shape.head_dim, 1))


def gated_delta(shape: Shape, heads: int) -> Kind:
    """q, k [1, n, H, D] of length 1, v [1, n, heads, D], beta and g [1, n, heads] -> o [1, n, heads, D]."""
    H, D = shape.heads, shape.head_dim

    def over(sp: lasp.SequenceParallel | None) -> Method:
        return lambda q, k, v, beta, g: lasp.delta_rule(q, k, v, beta, g, sp=sp)[0]

    def exact(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        return lasp.delta_rule(q, k, v, beta, g, backend="torch")[0]

    def draw(tokens: int, random: torch.Generator) -> Sample:
        q, k = (normalize(normal(1, tokens, H, D, random=random).float(), dim=-1) for _ in range(2))
        v, d_o = (normal(1, tokens, heads, D, random=random) for _ in range(2))
        beta, gate = (torch.rand(1, tokens, heads, device=random.device, generator=random) for _ in range(2))
        return Sample((q.to(v.dtype), k.to(v.dtype), v, beta, -STRONGEST_GATE * gate), d_o)

    return Kind(over, exact, draw, Payload(heads, D, D, D * D), heads=heads)


def whole_layer(family: str, size: str, device: torch.device, load: Payload | None, **overrides: int) -> Kind:
    """x [1, n, d_model] -> y of its shape, by a middle layer of a preset, whose weights are the same on all ranks."""
    config = preset(family, size, **overrides)
    torch.manual_seed(0)
    layer = config.build_mixer(config.num_layers // 2)  # the first may have positions, late ones hardly a decay
    exactly = _in_fp64(layer).to(device)
    layer = layer.to(device)

    def over(sp: lasp.SequenceParallel | None) -> Method:
        def method(x: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
                y: Tensor = layer(x, sp=sp)[0]
            return y

        return method

    def draw(tokens: int, random: torch.Generator) -> Sample:
        x, d_y = (normal(1, tokens, config.d_model, random=random) for _ in range(2))
        return Sample((x,), d_y)

    return Kind(over, lambda x: exactly(x)[0], draw, load, tuple(layer.parameters()))


def _in_fp64(layer: nn.Module) -> nn.Module:
    layer = deepcopy(layer).double()
    vars(layer)["backend"] = "torch"
    return layer
