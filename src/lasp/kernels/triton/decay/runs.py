"""Chooses the plan and the launches of a run: made once for its shapes."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import torch

from lasp.kernels.triton.common.device import device_limits
from lasp.kernels.triton.common.packing import packed_changes
from lasp.kernels.triton.decay.channel.launches import ChannelLaunches
from lasp.kernels.triton.decay.launches import RunShape
from lasp.kernels.triton.decay.plan import CHANNEL, LaunchPlan, plan
from lasp.kernels.triton.decay.scalar.grouped.launches import scalar_launches
from lasp.kernels.triton.decay.scalar.launches import ScalarLaunches
from lasp.recurrence.documents import Documents

Launches: TypeAlias = ScalarLaunches | ChannelLaunches


@lru_cache(maxsize=256)
def launches_of(shape: RunShape, device: torch.device) -> Launches:
    """Return the launches for such runs.

    Raises:
        ValueError: the kernels do not take such tensors.
    """
    return _launches(shape, plan_of(shape, device), device)


def packed_launches_of(shape: RunShape, documents: Documents, device: torch.device) -> Launches:
    """The same for documents, which keep them."""
    if (shape, device) not in documents.layouts:
        p = _packed_plan(shape, documents, device)
        p = p._replace(**packed_changes(p, documents, device))
        documents.layouts[shape, device] = _launches(shape, p, device)
    found: Launches = documents.layouts[shape, device]
    return found


def plan_of(shape: RunShape, device: torch.device) -> LaunchPlan:
    """The launch configuration of one run of these tokens."""
    B, T, H_v, V = shape.v
    limits = device_limits(device)
    return plan(T, B * H_v, shape.q[3], V, shape.dtype, shape.kind, *limits, shape.from_zero)


def _packed_plan(shape: RunShape, documents: Documents, device: torch.device) -> LaunchPlan:
    """The plan for so many runs of the longest document's length if those gather; else that for one run."""
    tokens, longest = shape.v[1], max((end - start for start, end in documents.spans), default=0)
    if shape.from_zero and longest > 0:
        alike = -(-tokens // longest)
        q, v = (alike, longest, *shape.q[2:]), (alike, longest, *shape.v[2:])
        p = plan_of(shape._replace(q=q, v=v), device)
        if p.gathers:
            return p
    return plan_of(shape._replace(from_zero=False), device)


def _launches(shape: RunShape, p: LaunchPlan, device: torch.device) -> Launches:
    if shape.kind == CHANNEL:
        return ChannelLaunches(shape, p)
    processors, _, hopper = device_limits(device)
    return scalar_launches(shape, p, hopper, processors)
