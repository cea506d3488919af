"""The decay family: no decay, a constant per head, a gate per head, a gate per channel."""

from __future__ import annotations

from typing import Any

import torch

from lasp.algebra import Diagonal, Identity, Scalar, Transition
from lasp.recurrence.stages import DecayInputs, num_states


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States, decays and what crosses ranks are fp32, or fp64 for fp64 inputs: never 16 bits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_shape(x: Any) -> tuple[int, int, int, int]:
    """[B, H_v, K, V] of the states; [documents here, H_v, K, V] where they are packed."""
    return (num_states(x), x.v.shape[2], x.q.shape[3], x.v.shape[3])


def transition(x: DecayInputs) -> Transition:
    """The product of the run's transitions, for each of its states."""
    count, heads = num_states(x), x.v.shape[2]
    if x.g is None:
        return Identity()
    if x.g.dim() == 1:
        if x.documents is None:
            # Not a product: no tokens of a decay of -inf would be NaN.
            total = x.g * x.v.shape[1] if x.v.shape[1] else torch.zeros_like(x.g)
            return Scalar(total.expand(count, -1))
        lengths = torch.tensor([end - start for start, end in x.documents.spans], dtype=x.g.dtype, device=x.g.device)
        return Scalar(lengths[:, None] * x.g)
    if x.documents is None:
        total = x.g.sum(1, dtype=torch.float64)
    else:  # added one by one: in fp32 that would be percents off over a million tokens
        total = x.g.new_zeros(count, heads, *x.g.shape[3:], dtype=torch.float64)
        total.index_add_(0, x.documents.of_tokens.to(x.g.device), x.g[0].double())
    total = total.to(x.g.dtype)
    return Scalar(total) if x.g.dim() == 3 else Diagonal(total)
