"""What reaches a terminal: no orders to it, everything in time, and nothing that a run waits for."""

from __future__ import annotations

import os
import sys

import pytest

from lasp.train.outlet import Outlet, printable
from lasp.train.output import Output


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
