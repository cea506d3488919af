"""The decay family: no decay, a constant per head, a gate per head, a gate per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.algebra import Diagonal, Identity, Scalar, Transition
from lasp.recurrence.contract import Run


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States, decays and what crosses ranks are fp32, or fp64 for fp64 inputs: never 16 bits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_shape(x: Run) -> tuple[int, int, int, int]:
    """[B, H_v, K, V] of the state."""
    return (x.q.shape[0], x.v.shape[2], x.q.shape[3], x.v.shape[3])


def transition(x: Run) -> Transition:
    """The product of the run's transitions."""
    if x.g is None:
        return Identity()
    if x.g.dim() == 1:
        return Scalar((x.g * x.v.shape[1]).expand(x.v.shape[0], -1))
    total: Tensor = x.g.sum(1)
    return Scalar(total) if x.g.dim() == 3 else Diagonal(total)
