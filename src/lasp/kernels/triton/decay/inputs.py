"""A run of the decay family as the kernels take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lasp.kernels.triton.common.launch import use_scratch
from lasp.kernels.triton.decay.runs import Launches, launches_of
from lasp.recurrence.inputs import DecayInputs


class DecayRun(NamedTuple):
    """Contiguous tensors, as in `DecayInputs`, and the launches that runs of their shapes take."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    work: Launches

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.g

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> DecayRun:
        return DecayRun(*tensors, self.work)  # type: ignore[arg-type, call-arg]


def prepare(x: DecayInputs, alone: bool) -> DecayRun:
    """x with dense tensors, and the work on it.

    alone: x is the whole sequence and starts from no state.

    Raises:
        ValueError: the kernels do not take such tensors.
    """
    work = launches_of(x, alone)
    use_scratch()
    q, k, v, g = x.q, x.k, x.v, x.g
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and (g is None or g.is_contiguous())):
        q, k, v, g = q.contiguous(), k.contiguous(), v.contiguous(), None if g is None else g.contiguous()
    return DecayRun(q, k, v, g, work)
