"""Channel mixers: gated linear units (SwiGLU, and SGLU without activation) and the plain two-layer kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


FEEDFORWARDS: dict[str, Callable[[int, int], nn.Module]] = {
    "sglu": lambda d_model, ffn_dim: GatedLinearUnit(d_model, ffn_dim, None),
    "swiglu": lambda d_model, ffn_dim: GatedLinearUnit(d_model, ffn_dim, F.silu),
    "gelu": lambda d_model, ffn_dim: TwoLayer(d_model, ffn_dim, F.gelu),
    "relu": lambda d_model, ffn_dim: TwoLayer(d_model, ffn_dim, torch.relu),
}


def feedforward(name: str, d_model: int, ffn_dim: int) -> nn.Module:
    """A new channel mixer [..., d_model] -> [..., d_model]; ValueError for an unknown name."""
    if name not in FEEDFORWARDS:
        raise ValueError(f"unknown ffn {name!r}; known: {', '.join(FEEDFORWARDS)}")
    return FEEDFORWARDS[name](d_model, ffn_dim)
