"""A Trainer whose weights accelerate shards by FSDP2 over ranks that share sequences, against one in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import world

GPUS = torch.cuda.device_count()
SCRIPT = Path(__file__).parent / "fsdp_over_devices.py"
DEVICES = [
    pytest.param("cpu", 4, marks=pytest.mark.exhaustive),
    *([("cuda", 4 if GPUS >= 4 else 2)] if GPUS > 1 else []),
]


@pytest.mark.parametrize(("device", "processes"), DEVICES)
def test_sharded_weights_train_as_whole_ones(device: str, processes: int, tmp_path: Path) -> None:
    """SP 2, and DP 2 x SP 2 where there are so many devices; 20 steps with accumulation and clipping, in fp64.

    transformers computes the loss in fp32; the control is a run with rows that another group has.
    """

    def trained(processes: int, rows: int) -> dict[str, Any]:
        command = [*world.torchrun(processes), str(SCRIPT), device, str(min(processes, 2)), str(rows), str(tmp_path)]
        done = forked.run(command, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert found.pop("is_sharded") == (processes > 1) and len(found["losses"]) == 20
        return found

    alone = {rows: trained(1, rows) for rows in (2, 4)}
    for ranks in (2, 4)[: 1 + (processes > 2)]:
        found = trained(ranks, 2)
        expected = alone[ranks]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-9)
        assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-6)
        assert found["weights"] == pytest.approx(expected["weights"], abs=1e-9)
        assert found["losses"] != pytest.approx(alone[6 - ranks]["losses"], rel=1e-3)
