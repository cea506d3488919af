"""Tests that where GPUs are seen none is a fork: what has looked at a GPU leaves its forks no backward pass."""

from __future__ import annotations

import sys
from pathlib import Path

import forked
import pytest
import torch
from gpus import uses_gpus

TESTS = Path(__file__).parent


def test_programs_are_new_interpreters_where_gpus_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys; print('forked' in sys.modules)")
    command = [sys.executable, str(program)]
    assert forked.run(command).stdout == "True\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert forked.run(command).stdout == "False\n"


def test_what_runs_on_gpus_forks_no_ranks() -> None:
    forks = [
        file
        for file in TESTS.rglob("test_*.py")
        if "world import run" in (text := file.read_text()) or "world.run(" in text
    ]
    assert len(forks) > 30 and not list(filter(uses_gpus, forks))
