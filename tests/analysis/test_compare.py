"""Which rows of a comparison of two revisions count as slower, and that it compares what it is told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare


def test_a_row_is_slower_by_the_median_of_its_rounds() -> None:
    faster, noisy, slower = (
        compare.compared(name, [1.0, 2.0, 1.0], times)
        for name, times in (("faster", [0.9, 1.8, 0.9]), ("noisy", [1.0, 2.0, 5.0]), ("slower", [1.03, 2.06, 1.0]))
    )
    nothing = compare.compared("nothing", [1.0], [float("nan")])
    assert compare.slower([faster, noisy, slower, nothing], 1.02) == [slower, nothing]
    assert (noisy.ratio, noisy.least, noisy.most) == (1.0, 1.0, 5.0)


def test_a_revision_is_measured_with_its_own_library(tmp_path: Path) -> None:
    for name, text in (("a", ""), ("b", "raise ImportError")):
        library = tmp_path / name / "src" / "lasp"
        library.mkdir(parents=True)
        (library / "__init__.py").write_text(text)
    compare.Revision(tmp_path / "a", tmp_path / "cache").end()
    with pytest.raises(RuntimeError, match="exit code 1"):
        compare.Revision(tmp_path / "b", tmp_path / "cache")


def test_two_revisions_or_two_folders() -> None:
    command = [sys.executable, str(Path(compare.__file__)), "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "expected two revisions" in done.stderr
