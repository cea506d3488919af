"""Tests what reaches a terminal: no orders to it, everything in time, and nothing that a run waits for."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path

import pytest

from lasp.cli import main as cli
from lasp.terminal import Outlet, counted, printable
from lasp.train.logging.output import Output

SOURCE = Path(cli.__file__).parents[1]


def test_so_many_of_something() -> None:
    assert [counted(n, "step") for n in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]
    assert [counted(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]


def test_a_terminal_is_given_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;title\x07 \x1b[31m \r \x9b2J \u202e \udcff \0"
    shown = "\u241b]0;title\u2407 \u241b[31m \u240d \ufffd2J \ufffd \ufffd \u2400"
    assert printable(hostile) == shown and printable("naïve\t漢字\n") == "naïve\t漢字\n"
    output = Output(enabled=True, log_every=1)
    output.line(hostile)
    output.piece(hostile)
    output.heading(hostile)
    output.table("name", {"path": hostile})
    assert not output.attempt(hostile, lambda: os.stat(f"/nowhere/{hostile[:3]}"))
    said = capsys.readouterr().out
    assert said.count(shown) == 5 and not any(sign in said for sign in "\x1b\r\x9b\x07\u202e")


def unescaped(source: str) -> list[str]:
    """Calls that print past the escape of lasp.terminal."""
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call for call in calls if re.fullmatch(r"print|(.*\.)?Console|.*\.print_exc.*|.*(stdout|stderr)\.write", call)
    ]


def test_nothing_is_printed_past_the_escape() -> None:
    for path in SOURCE.rglob("*.py"):
        if path != SOURCE / "terminal.py":
            assert not unescaped(path.read_text()), path
            assert "tyro.cli(" not in path.read_text() or path == SOURCE / "cli" / "arguments.py"
    assert unescaped("print(x)\nrich.console.Console()\nsys.stderr.write(x)\nconsole.print(x)") == [
        "print",
        "rich.console.Console",
        "sys.stderr.write",
    ]


def test_commands_print_what_they_are_given_without_its_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    evil = "a\x1b]0;t\x07\x9b2Jb"
    (tmp_path / evil).mkdir()
    (tmp_path / evil / "one.txt").write_text("hello world\n" * 20)
    gpu = (SOURCE.parents[1] / "examples" / "gpu" / "l40s.toml").read_text()
    (tmp_path / "gpu.toml").write_text(gpu.replace('"L40S"', json.dumps(evil)))
    for number, arguments in enumerate(
        (
            ["data", "build", evil, "--out", f"out{evil}"],
            ["data", "build", evil, "--out", f"out{evil}"],  # is there now
            ["plan", "--gpu", "gpu.toml"],
            ["plan", "--gpu", evil],
            ["plan", f"--{evil}"],
            ["plan", "--precision", evil],
            ["bench", "exchange", "--save", f"{evil}/no/where"],
            ["check", "--exchanges", evil],
            ["train", "--config", evil],
            ["report", evil],
            ["export", evil, "--out", "there"],
            [evil],
        )
    ):
        code = cli.main(arguments)
        said = "".join(capsys.readouterr())
        assert (code == 0) == (number in (0, 2)) and re.search(r"(\u241b|\\x1b)\]0;t", said), (arguments, said)
        assert not any(sign in said for sign in "\x1b\x07\x9b"), (arguments, said)


def test_what_nobody_reads_yet_waits_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    monkeypatch.setattr(sys, "stdout", open(write_end, "w"))  # noqa: SIM115 - closed below
    outlet = Outlet()
    lines = [f"line {number}\n" for number in range(20_000)]  # three times what a pipe holds
    for line in lines:
        outlet.write(line)
    received = b""
    while len(received) < len("".join(lines)):
        received += os.read(read_end, 4096)
        outlet.flush()
    assert received.decode() == "".join(lines)
    os.close(read_end)
    told: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", told.append)
    for line in lines:
        outlet.write(line)
    assert "".join(told).count("nobody reads standard output any more") == 1
    sys.stdout.close()
