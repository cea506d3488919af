"""Fused Triton kernels."""

from collections.abc import Mapping

from lasp.kernels.torch import unmasked
from lasp.kernels.triton.common.pieces import cutting
from lasp.kernels.triton.decay.stages import STAGES as DECAY
from lasp.kernels.triton.delta.stages import STAGES as DELTA
from lasp.recurrence.stages import AnyStages

STAGES: Mapping[str, AnyStages] = {
    "decay": cutting(DECAY, rows=True, shared=True),
    "delta": cutting(DELTA, rows=False, shared=False),
    "unmasked": unmasked.STAGES,
}
