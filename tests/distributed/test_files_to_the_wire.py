"""A reader's way from an operator to the wire: few files, and the page on the architecture names them."""

from __future__ import annotations

from pathlib import Path

import pytest
from files_to_the_wire import ROOT, files_to_the_wire


def test_few_files_lead_to_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch_files, *triton_files = files_to_the_wire(("torch", "scalar"), ("triton", "scalar"), ("triton", "channel"))
    assert len(torch_files) <= 20 and max(map(len, triton_files)) <= 25, (torch_files, triton_files)
    page = (ROOT / "docs" / "design" / "architecture.md").read_text().partition("## The files on the way")[2]
    for files in (torch_files, *triton_files):
        assert "ops/functional.py" in files and "distributed/comm.py" in files
        assert not [name for name in files if f"{Path(name).name}`" not in page]
