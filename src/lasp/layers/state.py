"""The state of a layer that has a recurrence and a short convolution."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RecurrentState(NamedTuple):
    """Memory of a layer with a recurrence behind a short convolution.

    Attributes:
        memory: [B, H, K, V], the recurrence's state, fp32 (fp64 for an fp64 layer).
        window: [B, C, W - 1], the convolution's last inputs, in the layer's dtype.
    """

    memory: Tensor
    window: Tensor
