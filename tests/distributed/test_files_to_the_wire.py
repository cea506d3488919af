"""How far a reader has to go from an operator to the wire."""

from __future__ import annotations

from pathlib import Path

from files_to_the_wire import ROOT, files_to_the_wire


def test_twenty_files_with_the_torch_backend():
    """And the page on the architecture names them."""
    files = files_to_the_wire("torch")
    assert "ops/functional.py" in files and "distributed/comm.py" in files and len(files) <= 20, files
    page = (ROOT / "docs" / "design" / "architecture.md").read_text().partition("## The files on the way")[2]
    assert not [name for name in files if f"{Path(name).name}`" not in page]
