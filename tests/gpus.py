"""Tells which tests use GPUs: those that `make gpu` runs. All others run as on a machine without."""

from __future__ import annotations

import os
from pathlib import Path

ON_GPUS = os.environ.get("LASP_TEST_DEVICE") == "cuda"
_PLACES = (
    "kernels", "models/test_loss.py", "distributed/test_over_devices.py", "hf/test_models_over_devices.py",
    "hf/trainer/test_fsdp_over_devices.py",
)  # fmt: skip


def uses_gpus(file: Path) -> bool:
    """True if the file's tests run on a GPU where they see one."""
    return any(file.is_relative_to(Path(__file__).parent / place) for place in _PLACES)
