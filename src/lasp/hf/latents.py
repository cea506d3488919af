"""Multi-head latent attention: its latents cross the ranks, not the keys and values that are made of them.

The layer hands its latents to a cache where there is one, and goes on with what the cache returns. In a split pass it
is given one that returns the latents of all ranks up to this one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lasp.hf.library import cache_argument
from lasp.sequence import SequenceParallel
from lasp.softmax.gathered import gather_rows


class LatentCache:
    """Stands in the place of a cache. has_gathered: it was asked for the latents of all ranks."""

    def __init__(self, sp: SequenceParallel | None) -> None:
        self.sp = sp
        self.has_gathered = False

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """[B, 1, T, D] of this rank -> [B, 1, S, D] of all ranks up to it."""
        self.has_gathered = True
        found = gather_rows(keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous(), self.sp)
        return found[0].transpose(1, 2), found[1].transpose(1, 2)


def has_latents(layer: nn.Module) -> bool:
    """Returns whether a layer makes its keys and values of latents that a cache can hold."""
    return hasattr(layer, "expand_kv") and cache_argument(layer) is not None
