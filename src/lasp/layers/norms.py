"""Normalisations over the last dimension. Statistics of half-precision inputs are taken in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.fields import check_choice
from lasp.sequence.arguments import positive, whole


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), without parameters (TransNormerLLM, section 3.1.4)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = whole("dim", dim, 1), positive("eps", eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), eps=self.eps)


class RMSNorm(nn.Module):
    """SimpleRMSNorm times a learned gain per channel, which starts at 1."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = whole("dim", dim, 1), positive("eps", eps)
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), self.weight.to(x.dtype), self.eps)


class NormKind(NamedTuple):
    """A normalisation by name.

    Attributes:
        build: takes the number of channels and epsilon.
        saved: fp32 numbers that autograd keeps for each channel of a token: the input and, where there is a gain, the
            normalised input.
        statistics: fp32 numbers that it keeps for each token.
    """

    build: Callable[[int, float], nn.Module]
    saved: int
    statistics: int


NORMS = {
    "rmsnorm": NormKind(RMSNorm, saved=2, statistics=1),
    "simple_rmsnorm": NormKind(SimpleRMSNorm, saved=1, statistics=1),
    "layernorm": NormKind(lambda dim, eps: nn.LayerNorm(dim, eps), saved=1, statistics=2),
}


def norm(name: str, dim: int, eps: float) -> nn.Module:
    """A new normalisation of `dim` channels; ValueError for an unknown name."""
    check_choice("norm name", name, NORMS)
    return NORMS[name].build(whole("dim", dim, 1), positive("eps", eps))
