"""`lasp check` as a user runs it: it passes on a correct exchange and fails on a broken one."""

from __future__ import annotations

import sys

import forked
import pytest

SMALL = ["--model.overrides", "num_layers", "2", "d_model", "32", "num_heads", "2", "ffn_dim", "32"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        pytest.param(["--sp", "3", "--model.family", "retnet", *SMALL], 0, "is the same model", marks=pytest.mark.ci),
        pytest.param(
            ["--model.family", "linear-transformer", *SMALL],
            0,
            "is the same model",
            marks=pytest.mark.exhaustive,
        ),
        (["--break-exchange", "--exchange", "ring", *SMALL], 1, "is NOT the same"),
        (["--exchange", "rings"], 64, "--exchange must be all or one of"),
    ],
)
def test_check(arguments: list[str], code: int, text: str) -> None:
    command = [sys.executable, "-m", "lasp", "check", "--seq-len", "70", "--new-tokens", "3", *arguments]
    done = forked.run(command)
    assert done.returncode == code and text in done.stdout + done.stderr
