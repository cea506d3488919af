"""Every sort of kernel compiles ahead of time for devices that are not there, within what they have.

A clean compile is no pass: kernels beyond a device's shared memory compile all the same, some to a lone trap. About
10 s a target where nothing is cached.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_ahead.py"
# Bytes of registers a thread may spill. Hopper is what the configurations are made for.
SPILLS = {"cuda:90": 256, "cuda:100": 512, "cuda:80": 640, "hip:gfx942": 512}
# What a compiler does not manage: docs/kernels.md, "Portability".
FAILS = {"cuda:100": {"key_gradient_kernel"}}


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_compiles_within_the_device(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), target], env=environment, capture_output=True, text=True, check=True
    )
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"target"')]
    assert len(reports) == 8, done.stderr[-2000:]
    assert {report["kernel"] for report in reports if "error" in report} == FAILS.get(target, set())
    for report in reports:
        if "error" not in report:
            assert report["shared"] <= report["limit"], report
            assert report["matrix_instructions"] > 0 and not report["trap"], report
            assert report.get("spilled_bytes", 0) <= SPILLS.get(target, 0), report
