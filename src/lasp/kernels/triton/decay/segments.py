"""Sums that each segment adds to the state, and the scan over segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.triton.common.packing import bounds_of, places_of
from lasp.kernels.triton.decay.launches import DecayLaunches


class SegmentSums(NamedTuple):
    """States [B, H_v, segments, K, V] that each segment adds, and its decays [B, H_v, segments] or [.., K] (base 2)."""

    states: Tensor
    decays: Tensor

    def written(self, work: DecayLaunches) -> dict[str, Tensor]:
        """Arguments of the kernel that writes them."""
        return {
            "totals_ptr": self.states,
            "decays_ptr": self.decays,
            "places_ptr": places_of(work.plan, self.states),
        }


def segment_sums(work: DecayLaunches, like: Tensor) -> SegmentSums:
    """Returns them empty, on a tensor's device."""
    states = torch.empty(work.states, dtype=torch.float32, device=like.device)
    return SegmentSums(states, states.new_empty(work.decays))


def scanned(
    work: DecayLaunches, sums: SegmentSums, *, reverse: bool, summarized: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Replaces the segments' states by those at their starts (reverse: ends), from zero.

    Returns:
        The decays from the run's end on that side to them; of the whole run the natural log-decay and the state, or
        None unless `summarized`.
    """
    states, decays = sums
    before = states.new_empty(work.decays)
    total = states.new_empty(work.state) if summarized else None
    total_decay = states.new_empty(work.total_decay) if summarized else None
    scan = work.scan_adjoint if reverse else work.scan
    scan(
        states_ptr=states,
        decays_ptr=decays,
        before_ptr=before,
        bounds_ptr=bounds_of(work.plan, states),
        total_decay_ptr=total_decay,
        total_ptr=total,
    )
    return before, total_decay, total
