"""Models of transformers in one process and over two on a GPU, where there is one: as exact as their own code there."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import torch
import world
from hf.model_over_devices import WIDE
from hf.small_models import SMALL

SCRIPT = Path(__file__).parent / "model_over_devices.py"
ON_GPU = [("cuda", kind) for kind in WIDE if kind in SMALL and torch.cuda.is_available()]


@pytest.mark.parametrize(("device", "kind"), [pytest.param("cpu", "mamba2", marks=pytest.mark.exhaustive), *ON_GPU])
def test_a_model_is_as_exact_as_transformers(device: str, kind: str) -> None:
    done = forked.run([*world.torchrun(2), str(SCRIPT), device, kind], timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Kernels that are asked for fp32 compute in it, with other orders of sums; the reference's own errors beside.
    for dtype, least in (("float32", 3e-6), ("bfloat16", 4e-3)):
        for ours in ("one", "two"):
            pairs = zip(found[f"{dtype} {ours}"], found[f"{dtype} theirs"], strict=True)
            assert all(error <= 1.5 * reference + least for error, reference in pairs), found
    assert max(found["float32 theirs"]) < 1e-3 and found["alone"][0] > 1e-2, found
