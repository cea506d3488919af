"""All exchanges under torchrun: two processes over gloo everywhere, and all GPUs over NCCL where there are several."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import torch
import world

GPUS = torch.cuda.device_count()
SCRIPT = Path(__file__).parent / "over_devices.py"


def bound(name: str) -> float:
    """fp64 through PyTorch's products; fp32 through the kernels, a constant's gradient being a sum that cancels."""
    if not name.startswith("triton"):
        return 1e-12
    return 2e-5 if "constant" in name else 2e-6


@pytest.mark.parametrize(("device", "processes"), [("cpu", 2), *([("cuda", min(GPUS, 8))] if GPUS > 1 else [])])
def test_every_exchange_equals_one_process(device: str, processes: int) -> None:
    command = [*world.torchrun(processes), str(SCRIPT), device]
    done = forked.run(command, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("control: nothing exchanged") > 0.1
    bad = {name: error for name, error in found.items() if not error <= bound(name)}
    assert not bad and found
