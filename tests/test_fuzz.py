"""The fuzz: quiet on the library as it is, loud on one that is broken, and its reference means what it says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fuzz import pool, reference
from fuzz.__main__ import main
from fuzz.cases import draw
from fuzz.compare import _computes
from tolerances import relative_error
from torch import Tensor

from lasp.kernels import select
from lasp.kernels.torch import chunks

RUN = ("--device", "cpu", "--processes", "1", "--seed", "87")


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_long_decays_in_chunks_are_the_loop(gate: str) -> None:
    """Two formulas of one recurrence, with gates that forget all and none, and a head that forgets at every token."""
    shape = {"none": None, "scalar": (2, 150, 3), "channel": (2, 150, 3, 4)}[gate]
    g = None if shape is None else -torch.rand(shape, dtype=torch.float64)
    if g is not None:
        g[:, 20:30], g[:, 50], g[:, 70] = 0.0, -60.0, -torch.inf
        g[:, :, 2] = -8 - g[:, :, 2].exp()
    q, k, v, d_o = (torch.randn(2, 150, 3, 4, dtype=torch.float64) for _ in range(4))
    state = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    results = []
    for function in (reference.decay_loop, reference.decay_chunks):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, state, *([] if g is None else [g]))]
        o, final = function(*leaves[:3], leaves[4] if len(leaves) > 4 else None, leaves[3], 0.5)
        results.append([o, final, *torch.autograd.grad((o, final), leaves, (d_o, torch.ones_like(final)))])
    if g is not None:
        for found in results:
            found.append(found[-1][:, :, 2].sum(1))
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < 1e-13


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_a_delta_rule_in_chunks_is_the_loop(gate: str) -> None:
    """Unless its products round: then it is off by no more than so many roundings."""
    shape = {"none": None, "scalar": (1, 70, 2), "channel": (1, 70, 2, 8)}[gate]
    g = None if shape is None else -torch.rand(shape, dtype=torch.float64)
    q, k, v = (torch.randn(1, 70, 2, 8, dtype=torch.float64) for _ in range(3))
    k, beta = torch.nn.functional.normalize(k, dim=-1), torch.rand(1, 70, 2, dtype=torch.float64)
    state = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    loop, final = reference.delta(q, k, v, beta, g, state, 0.5)
    for rounded, least, most in ((torch.clone, 0.0, 1e-12), (lambda x: x.bfloat16().double(), 1e-4, 2e-2)):
        o, last = reference.delta_chunks(q, k, v, beta, g, state, 0.5, rounded)
        assert least <= relative_error(o, loop) <= most and least <= relative_error(last, final) <= most


def test_the_delta_rule_is_fused_where_the_library_fuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that it is judged as what multiplies in 16 bits, but for fp16, whose operands are fp32; on a CPU not."""
    assert not any(draw(87, index, "cpu", "delta").fused for index in range(60))
    monkeypatch.setattr(select, "_against_triton", lambda family, device, dtype, *_: "no" if dtype.itemsize > 4 else "")
    monkeypatch.setattr(select, "_chosen", {})
    cases = [draw(87, index, "cuda", "delta") for index in range(60)]
    found = {(case.backend, case.fused) for case in cases if case.dtype != "fp64"}
    assert found == {("auto", True), ("triton", True), ("torch", False), ("reference", False)}
    assert {(case.dtype, _computes(case)) for case in cases if case.fused} == {
        ("bf16", "bf16"), ("fp32", "fp32"), ("fp16", "fp32")
    }  # fmt: skip


def test_nothing_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*RUN, "--cases", "16"])
    told = capsys.readouterr().out
    assert code == 0 and "16 cases" in told and "real ranks" in told, told


def _without_first_state(self: chunks.Chunking, runs: Any, initial: Tensor, **options: bool) -> object:
    return _scan(self, runs, torch.zeros_like(initial), **options)


_scan = chunks.Chunking.scan


def test_a_state_dropped_at_a_boundary_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control; and the line that is printed for a case finds it again, on the operator that drops the state."""
    monkeypatch.setattr(chunks.Chunking, "scan", _without_first_state)
    assert main([*RUN, "--family", "decay", "--cases", "2"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FOUND")]
    assert lines
    arguments = lines[0].partition("python -m tests.fuzz ")[2].split()
    assert main(arguments) == 1
    monkeypatch.undo()
    assert main(arguments) == 0


def test_what_is_not_waited_for_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what was found until then, when time is over and when it is interrupted."""
    hanging = torch.multiprocessing.get_context("fork").Event()
    monkeypatch.setattr(pool, "check", lambda *case: hanging.wait())
    monkeypatch.setattr(pool, "GRACE_S", 0.2)
    assert main([*RUN, "--seconds", "0.2"]) == 0
    told = capsys.readouterr().out
    assert "--case 87:0" in told.partition("not finished after")[2] and "\n0 cases" in told

    def interrupted(draws: Iterator[pool.Draw], *_: object) -> Iterator[pool.Outcome]:
        yield pool.Outcome(next(draws), ["o off"], 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr("fuzz.__main__.run", interrupted)
    assert main(RUN) == 1
    assert "\n1 cases in 0 s, 1 findings" in capsys.readouterr().out


def test_a_process_that_dies_or_hangs_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One case kills its process, one never answers, one raises; the others are run."""
    hanging = torch.multiprocessing.get_context("fork").Event()

    def check(case: object, device: object, ranks: object) -> list[str]:
        index = next(i for i in range(6) if draw(87, i, "cpu", "all") == case)
        if index == 1:
            os._exit(7)
        if index == 2:
            hanging.wait()
        if index == 3:
            raise RuntimeError("a kernel is refused")
        return []

    monkeypatch.setattr(pool, "check", check)
    monkeypatch.setitem(pool.CASE_S, "cpu", 5.0)
    assert main([*RUN, "--cases", "6"]) == 1
    told = capsys.readouterr().out
    assert "6 cases" in told and "3 findings" in told
    for index, what in ((1, "died with exit code 7"), (2, "no answer within 5 s"), (3, "a kernel is refused")):
        assert what in told.partition(f"--case 87:{index}\n")[2].partition("FOUND")[0], told
