"""Compares results: the relative error of a whole tensor in fp64, and the bounds of every dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative Frobenius errors against the fp64 reference.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| in fp64; of an empty or zero reference, ||value||. NaN is infinite."""
    assert value.shape == reference.shape, (value.shape, reference.shape)
    value, reference = value.detach().double(), reference.detach().double()
    difference, size = (value - reference).norm().item(), reference.norm().item()
    error = difference / size if size > 0 else difference
    return float("inf") if error != error else error


def worst(values: dict[str, Tensor], references: dict[str, Tensor]) -> tuple[str, float]:
    """The name and error of the tensor that is furthest off."""
    assert values.keys() == references.keys()
    errors = {name: relative_error(values[name], references[name]) for name in values}
    name = max(errors, key=lambda key: errors[key])
    return name, errors[name]
