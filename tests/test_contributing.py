"""The examples in CONTRIBUTING.md, followed word for word in a copy of the sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lasp.models import NAMES

ROOT = Path(__file__).parents[1]
LAYER, TEST = "src/lasp/layers/simple_gla.py", "tests/layers/test_simple_gla.py"
RECURRENCE = ("src/lasp/kernels/reference/tied_gate.py", "src/lasp/ops/tied_gate.py", "tests/ops/test_tied_gate.py")
# The mixer's own test and those that go over all families, for it; the docs' tables; the command line.
FOLLOWED = f"""
import runpy, sys
import pytest
from lasp.cli.main import main
runpy.run_path("docs/tables.py", run_name="__main__")
general = ["models/test_presets.py", "models/test_causal_lm.py", "analysis/test_memory.py", "analysis/test_flops.py"]
tell = ["-o", "addopts=-q --strict-markers -ra", "-m", "not exhaustive"]  # not the slowest, by name
options = [*tell, "-n", "0", "-p", "no:cacheprovider", "-k", "simple or documented"]
code = pytest.main([*options[:-2], "{RECURRENCE[-1]}"])
code = code or pytest.main([*options, "{TEST}", *(f"tests/{{name}}" for name in general)])
sys.exit(code or main(["plan", "--model.family", "simple-gla", "--model.size", "tiny"]))
"""


def example(path: str) -> str:
    """The file that CONTRIBUTING.md shows after its name."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(rf"`{re.escape(path)}`:\n\n```python\n(.*?)```", page, re.DOTALL)
    assert found is not None, path
    return found[1]


@pytest.mark.ci
def test_a_mixer_is_one_file_and_its_test_and_a_recurrence_two(tmp_path: Path) -> None:
    assert "simple-gla" not in NAMES, "the control: it is not here yet"
    leave_out = shutil.ignore_patterns("__pycache__", "before", "earlier_exports", "results")
    for folder in ("src", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path in (LAYER, TEST, *RECURRENCE):
        (tmp_path / path).write_text(example(path))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run(
        [sys.executable, "-c", FOLLOWED], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "simple-gla-tiny (1M parameters)" in done.stdout and "[simple-gla]" not in done.stdout
    assert any("simple-gla | tiny" in page.read_text() for page in (tmp_path / "docs").rglob("*.md"))
