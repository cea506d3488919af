"""Tests which rows of a comparison of revisions count as slower, and that it compares what it is told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import compare

MEASURED = """
import lasp
def inputs(kind, *, stubbed): return kind
def forward(x, backend): return None
def both(x, backend): return None
speeds = iter([9.0, *[lasp.SPEED, 3 * lasp.SPEED] * 1000])  # a round that something else slows is no matter
def host_milliseconds(call, rounds, warm_up): return {"min": next(speeds)}
"""


def test_a_row_is_slower_by_the_ratio_of_medians() -> None:
    faster, noisy, slower = (
        compare.compared(name, "b", [1.0, 2.0, 1.0], times)
        for name, times in (("faster", [0.9, 1.8, 0.9]), ("noisy", [1.0, 2.0, 5.0]), ("slower", [1.03, 2.06, 1.0]))
    )
    nothing = compare.compared("nothing", "b", [1.0], [float("nan")])
    assert compare.slower([faster, noisy, slower, nothing], 1.02) == [noisy, slower, nothing]
    assert (noisy.ratio, noisy.least, noisy.most) == (2.0, 1.0, 5.0)


def test_each_revision_is_measured_with_its_own_library(tmp_path: Path) -> None:
    files = {
        "compare.py": Path(compare.__file__).read_text(),
        "host_cost.py": MEASURED,
        "torch.py": "import contextlib\nclass autograd: set_multithreading_enabled = contextlib.nullcontext",
        "base/src/lasp/__init__.py": "SPEED = 2.0",
        "slow/src/lasp/__init__.py": "SPEED = 3.0",
        "bad/src/lasp/__init__.py": "SPEED",
    }
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    command = [sys.executable, "compare.py", "--rounds", "2", "--processes", "2", "--shapes", "--"]
    done = subprocess.run([*command, "base", "base", "slow"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    rows = len(compare.HOST_KINDS) * len(compare.HOST_PARTS)
    ends = (
        "base 2.000 2.000 1.000 1.000 1.000",
        "slow 2.000 3.000 1.500 1.500 1.500 beyond",
        f"{rows} of {2 * rows} rows beyond 1.02",
    )
    printed = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert [sum(line.endswith(end) for line in printed) for end in ends] == [rows, rows, 1]
    bad = subprocess.run([*command, "base", "bad"], cwd=tmp_path, capture_output=True, text=True)
    assert bad.returncode == 1 and "bad/src ended with exit code 1" in bad.stderr


def test_two_revisions_at_least() -> None:
    command = [sys.executable, str(Path(compare.__file__)), "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "expected at least two revisions" in done.stderr
