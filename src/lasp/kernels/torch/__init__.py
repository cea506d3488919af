"""Chunked PyTorch: runs on every device."""

from collections.abc import Mapping

from lasp.kernels.torch import decay, delta, unmasked
from lasp.recurrence.stages import AnyStages

STAGES: Mapping[str, AnyStages] = {"decay": decay.STAGES, "delta": delta.STAGES, "unmasked": unmasked.STAGES}
