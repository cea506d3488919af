"""Channel mixers: gated linear units (SwiGLU, and SGLU without activation) and the plain two-layer kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.fields import check_choice, check_counts


class GatedLinearUnit(nn.Module):
    """down(activation(gate(x)) * up(x)). SGLU, TransNormerLLM's, is the one whose activation is the identity."""

    def __init__(self, d_model: int, ffn_dim: int, activation: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(d_model, ffn_dim, bias=False)
        self.up = nn.Linear(d_model, ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        if self.activation is not None:
            gate = self.activation(gate)
        return self.down(gate * self.up(x))


class TwoLayer(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, d_model: int, ffn_dim: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(d_model, ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class FeedForwardKind(NamedTuple):
    """A channel mixer by name.

    Attributes:
        build: takes d_model and ffn_dim.
        inputs: projections that read its input.
        saved: numbers that autograd keeps for each hidden channel, in the dtype of matrix products.
    """

    build: Callable[[int, int], nn.Module]
    inputs: int
    saved: int


def _gated(activation: Callable[[Tensor], Tensor] | None) -> Callable[[int, int], nn.Module]:
    return lambda d_model, ffn_dim: GatedLinearUnit(d_model, ffn_dim, activation)


def _two_layer(activation: Callable[[Tensor], Tensor]) -> Callable[[int, int], nn.Module]:
    return lambda d_model, ffn_dim: TwoLayer(d_model, ffn_dim, activation)


FEEDFORWARDS = {
    "sglu": FeedForwardKind(_gated(None), inputs=2, saved=3),
    "swiglu": FeedForwardKind(_gated(F.silu), inputs=2, saved=4),
    "gelu": FeedForwardKind(_two_layer(F.gelu), inputs=1, saved=2),
    "relu": FeedForwardKind(_two_layer(torch.relu), inputs=1, saved=1),
}


def feedforward(name: str, d_model: int, ffn_dim: int) -> nn.Module:
    """A new channel mixer [..., d_model] -> [..., d_model]; ValueError for an unknown name."""
    check_choice("ffn name", name, FEEDFORWARDS)
    check_counts(d_model=d_model, ffn_dim=ffn_dim)
    return FEEDFORWARDS[name].build(d_model, ffn_dim)
