"""Chooses the plan and the launches of a run: made once for its shapes."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from lasp.kernels.triton.common.device import device_limits
from lasp.kernels.triton.common.packing import packed_changes
from lasp.kernels.triton.decay.channel.launches import ChannelLaunches
from lasp.kernels.triton.decay.launches import RunShape
from lasp.kernels.triton.decay.plan import CHANNEL, LaunchPlan, kind_of, plan
from lasp.kernels.triton.decay.scalar.launches import ScalarLaunches
from lasp.recurrence.documents import Documents
from lasp.recurrence.inputs import DecayInputs

Launches: TypeAlias = ScalarLaunches | ChannelLaunches


def plan_of(q: Tensor, v: Tensor, g: Tensor | None, from_zero: bool) -> LaunchPlan:
    """The launch configuration of one run of these tokens."""
    return _plan(RunShape(q.shape, v.shape, q.dtype, kind_of(g), False, 1.0, from_zero), q.device)


def _plan(shape: RunShape, device: torch.device) -> LaunchPlan:
    B, T, H_v, V = shape.v
    limits = device_limits(device)
    return plan(T, B * H_v, shape.q[3], V, shape.dtype, shape.kind, *limits, shape.from_zero)


def _packed_plan(shape: RunShape, documents: Documents, device: torch.device) -> LaunchPlan:
    """The plan for so many runs of the longest document's length if those gather; else that for one run."""
    tokens, longest = shape.v[1], max((end - start for start, end in documents.spans), default=0)
    if shape.from_zero and longest > 0:
        alike = -(-tokens // longest)
        q, v = (alike, longest, *shape.q[2:]), (alike, longest, *shape.v[2:])
        p = _plan(shape._replace(q=q, v=v), device)
        if p.gathers:
            return p
    return _plan(shape._replace(from_zero=False), device)


def _launches(shape: RunShape, p: LaunchPlan) -> Launches:
    return ChannelLaunches(shape, p) if shape.kind == CHANNEL else ScalarLaunches(shape, p)


@lru_cache(maxsize=256)
def _launches_of(shape: RunShape, device: torch.device) -> Launches:
    return _launches(shape, _plan(shape, device))


def launches_of(x: DecayInputs, from_zero: bool = False) -> Launches:
    """Return the launches for x.

    from_zero: x is the whole sequence and starts from no state.

    Raises:
        ValueError: the kernels do not take such tensors.
    """
    with_decay = x.g is not None and x.g.requires_grad
    shape = RunShape(x.q.shape, x.v.shape, x.q.dtype, kind_of(x.g), with_decay, x.scale, from_zero)
    if x.documents is None:
        return _launches_of(shape, x.q.device)
    layouts, device = x.documents.layouts, x.q.device
    if (shape, device) not in layouts:
        p = _packed_plan(shape, x.documents, device)
        p = p._replace(**packed_changes(p, x.documents, device))
        layouts[shape, device] = _launches(shape, p)
    found: Launches = layouts[shape, device]
    return found
