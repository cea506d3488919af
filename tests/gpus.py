"""Tells which tests use GPUs: those that `make gpu` runs. All others run as on a machine without."""

from __future__ import annotations

import os
from pathlib import Path

ON_GPUS = os.environ.get("LASP_TEST_DEVICE") == "cuda"
_TESTS = Path(__file__).parent


def uses_gpus(file: Path) -> bool:
    """True if the file's tests run on a GPU where they see one."""
    own = file.relative_to(_TESTS)
    return own.parts[0] == "kernels" or own.name.endswith("_over_devices.py") or own == Path("models/test_loss.py")
