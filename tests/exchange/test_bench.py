"""`lasp bench exchange` as a user runs it."""

from __future__ import annotations

import json

import pytest

from lasp.cli.main import main
from lasp.exchange import EXCHANGES, Auto, Constants, Payload


def test_measures_and_saves(tmp_path, capfd):
    """Two processes: constants that the model loads, every schedule timed, one chosen for each load."""
    constants, output = tmp_path / "constants.json", tmp_path / "figures.json"
    arguments = ["--nproc", "2", "--repetitions", "1", "--save", str(constants), "--output", str(output)]
    assert main(["bench", "exchange", *arguments]) == 0
    printed = capfd.readouterr().out
    assert "2 ranks over gloo" in printed and "chosen" in printed
    figures = json.loads(output.read_text())
    assert figures["ranks"] == 2 and figures["repetitions"] == 1
    loads = {(row["state_bytes"], row["transition"]) for row in figures["rows"]}
    assert len(figures["rows"]) == len(loads) * len(EXCHANGES)
    assert sum(row["chosen"] for row in figures["rows"]) == len(loads)
    assert all(row["measured_s"] > 0 and row["predicted_s"] > 0 for row in figures["rows"])
    text = Auto(Constants.load(constants)).explain(Payload(4, 8, 8, 1), (2,))
    assert "measured on 2 ranks over gloo on cpu" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "lasp bench exchange"),
        (["kernels"], "lasp bench exchange"),
        (["exchange", "--nproc", "1"], "--nproc must be at least 2"),
        (["exchange", "--repetitions", "0"], "--repetitions must be at least 1"),
        (["exchange", "--save", "/no/such/folder/constants.json"], "does not exist"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    assert main(["bench", *arguments]) == 64
    assert message in capsys.readouterr().err
