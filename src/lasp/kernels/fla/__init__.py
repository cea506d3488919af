"""Adapters to flash-linear-attention's kernels (the extra `fla`). Nothing of it is imported before its first use."""

from collections.abc import Mapping

from lasp.kernels.fla import delta
from lasp.recurrence.stages import AnyStages

STAGES: Mapping[str, AnyStages] = {"delta": delta.STAGES}
