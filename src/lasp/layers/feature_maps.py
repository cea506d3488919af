"""Feature maps phi(q), phi(k): what replaces the exponential of softmax attention.

To add one, derive from FeatureMap, with parameters or without, and enter it in FEATURE_MAPS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.fields import check_choice, check_counts


class FeatureMap(nn.Module):
    """Takes [B, T, H, head_dim] to [B, T, H, dim_out] in the same dtype."""

    dim_out: int


class Elementwise(FeatureMap):
    """A parameter-free map applied to every channel: `function` keeps the shape and the dtype."""

    def __init__(self, head_dim: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.dim_out = head_dim
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Hedgehog(FeatureMap):
    """Learned positive features: softmax over the channels of [W x, -W x], one W per head.

    Starts from the identity, so the features of a new model are those of the untransformed query or key.
    Source: Zhang et al., "The Hedgehog & the Porcupine" (2024), equation 6 with the softmax normalisation.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.dim_out = 2 * head_dim
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.weight.shape[-1]).expand_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        mapped = torch.einsum("bthi,hij->bthj", x, self.weight.to(x.dtype))
        return torch.cat((mapped, -mapped), dim=-1).softmax(dim=-1).to(x.dtype)


def _identity(x: Tensor) -> Tensor:
    return x


def _elu_plus_one(x: Tensor) -> Tensor:
    # exp(x) where x < 0, of which little is left where 16 bits hold exp(x) - 1.
    return (F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1).to(x.dtype)


class FeatureMapKind(NamedTuple):
    """A map by name.

    Attributes:
        build: takes the number of heads and the head dim.
        saved: numbers that autograd keeps for each channel of a query or key, in the dtype of matrix products.
        widening: dim_out over the head dim.
        is_non_negative: scores cannot be negative: only such maps may be divided by the sum of their scores.
    """

    build: Callable[[int, int], FeatureMap]
    saved: int = 1
    widening: int = 1
    is_non_negative: bool = False


def _elementwise(function: Callable[[Tensor], Tensor]) -> Callable[[int, int], FeatureMap]:
    return lambda num_heads, head_dim: Elementwise(head_dim, function)


FEATURE_MAPS = {
    "identity": FeatureMapKind(_elementwise(_identity)),
    "elu+1": FeatureMapKind(_elementwise(_elu_plus_one), saved=2, is_non_negative=True),
    "relu": FeatureMapKind(_elementwise(torch.relu), is_non_negative=True),
    "silu": FeatureMapKind(_elementwise(F.silu), saved=2),
    "hedgehog": FeatureMapKind(Hedgehog, saved=3, widening=2, is_non_negative=True),
}
NON_NEGATIVE = frozenset(name for name, kind in FEATURE_MAPS.items() if kind.is_non_negative)


def feature_map(name: str, num_heads: int, head_dim: int) -> FeatureMap:
    """A new feature map for `num_heads` heads of `head_dim` channels; ValueError for an unknown name."""
    check_choice("feature map name", name, FEATURE_MAPS)
    check_counts(num_heads=num_heads, head_dim=head_dim)
    return FEATURE_MAPS[name].build(num_heads, head_dim)
