"""The exchange through memory that ranks share, over processes and in the interpreter; test_over_devices.py on GPUs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forked
import pytest

SCRIPT = Path(__file__).parent / "peer_memory.py"


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_every_rank_gets_what_those_before_it_send(ranks: int) -> None:
    done = forked.run([sys.executable, str(SCRIPT), str(ranks)])
    assert done.returncode == 0, done.stderr[-2000:]
    for rank, found in enumerate(json.loads(done.stdout.splitlines()[-1])):
        assert found.pop("collected") is True
        nobody, own, other = [0] * 8, [7, 0, 5, int(rank == ranks - 1)], [7, 0, 5, int(rank != ranks - 1)]
        others = 37 if rank < ranks - 1 else 37 * (ranks - 1)  # to the last rank all others are at another call
        assert found.pop("another call") == [0, nobody, 0, nobody, 37, [*own, *other], others, [*own, *other]]
        assert rank == 0 or "did not send its state in time" in found.pop("late")
        assert found.pop("dense, schedule") == 0
        assert len(found) == 6 and max(found.values()) < 2e-6, found
