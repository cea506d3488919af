"""Heads wider than the kernels take, through the public operators, against the PyTorch backend in fp64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from exchange.simulated import run as simulate
from exchange.simulated import sequence_parallel
from problems import GATES, make, solve
from test_delta import Case, check
from tolerances import relative_error
from torch import Tensor

import lasp
from lasp.kernels import select
from lasp.kernels.triton.common import pieces
from lasp.kernels.triton.common.pieces import HeadCut

BOUND, BOUND_16 = 4e-6, 1.2e-2
# Two parts of keys and three of values, the last ones filled up with zeros, where parts have at most 16 columns.
WIDE = {"batch": 1, "tokens": 40, "heads": 2, "value_heads": 4, "keys": 20, "values": 37}


@pytest.fixture(autouse=True)
def _narrow_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.node.name:
        for module in (pieces, select):
            monkeypatch.setattr(module, "FUSED_MAX_DIM", 16)


def test_real_widths(device: torch.device) -> None:
    problem = make("constant", batch=1, tokens=5, heads=1, value_heads=1, keys=16, values=258)
    values, references = solve(problem, "triton", torch.float32, device), solve(problem, "torch")
    errors = {name: relative_error(value, references[name]) for name, value in values.items()}
    assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize(
    ("gate", "dtype"),
    [
        *(pytest.param(g, torch.float32, marks=pytest.mark.ci) for g in GATES[:2]),
        *((g, torch.float32) for g in GATES[2:]),
        ("channel", torch.bfloat16),
    ],
)
def test_linear_attention(gate: str, dtype: torch.dtype, device: torch.device) -> None:
    """Keys and values, grouped heads; packed, with a document that ends in the middle of a chunk. Gates per channel,
    which parts of values share, have kernels of their own in bf16."""
    problem = make(gate, **WIDE, cu_seqlens=(0, 11, 40) if gate in ("none", "channel") else None)
    values, references = solve(problem, "triton", dtype, device), solve(problem, "torch")
    errors = {name: relative_error(value, references[name]) for name, value in values.items()}
    assert max(errors.values()) <= (BOUND if dtype == torch.float32 else BOUND_16), errors


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_delta_rule(gate: str, device: torch.device) -> None:
    """Values alone: rows of the state know of one another."""
    check(Case(gate, T=40, V=37, documents=(0, 11, 40) if gate == "scalar" else None, normalize=True), device)


@pytest.mark.parametrize("gate", ["scalar", *(pytest.param(g, marks=pytest.mark.ci) for g in GATES if g != "scalar")])
def test_over_ranks(gate: str, device: torch.device) -> None:
    """Results are those of uncut heads on one device, and so are the messages: a head's decay crosses once."""
    problem = make(gate, **WIDE | {"tokens": 24})
    references = solve(replace(problem, d_final=torch.zeros_like(problem.d_final)), "torch")

    whole = {"initial_state"} | ({"g"} if gate == "constant" else set())

    def work(backend: str, comm: Any) -> tuple[dict[str, float], int]:
        sp = sequence_parallel(comm, "all_gather", (13, 11))
        leaves: dict[str, Any] = {
            name: None if t is None else (t if name in whole else sp.shard(t)).to(device, torch.float32)
            for name, t in problem.inputs.items()
        }
        wanted = {name: leaves[name].requires_grad_() for name in "qkv"}
        o, _ = lasp.linear_attention(**leaves, sp=sp, backend=backend)
        o.backward(sp.shard(problem.d_o).to(o))
        values = {"o": o.detach()} | {f"d_{name}": leaf.grad for name, leaf in wanted.items()}
        errors = {n: relative_error(value.cpu(), sp.shard(references[n])) for n, value in values.items()}
        return errors, comm.counters.sent_bytes

    cut = simulate(2, partial(work, "triton"))
    assert max(max(errors.values()) for errors, _ in cut) <= BOUND, cut
    assert [sent for _, sent in cut] == [sent for _, sent in simulate(2, partial(work, "torch"))]


@pytest.mark.parametrize("gate", ["scalar", pytest.param("channel", marks=pytest.mark.ci)])
def test_compiled(gate: str, device: torch.device) -> None:
    """The operator's shapes are known without running it, and its gradients are the eager ones."""
    problem = make(gate, **WIDE | {"tokens": 20})
    inputs = [problem.inputs[name] for name in ("q", "k", "v", "g")]
    leaves = [t.to(device, torch.float32).requires_grad_() for t in inputs if t is not None]

    def attend(*x: Tensor) -> Tensor:
        return 2 * lasp.linear_attention(*x, backend="triton")[0]

    eager = attend(*leaves)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
    d_o = problem.d_o.to(eager)
    for got, expected in zip(
        (compiled, *torch.autograd.grad(compiled, leaves, d_o)),
        (eager, *torch.autograd.grad(eager, leaves, d_o)),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_a_part_in_another_place_shows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make("scalar", **WIDE)
    references = solve(problem, "torch")
    of_keys = HeadCut.of_keys
    monkeypatch.setattr(HeadCut, "of_keys", lambda cut, x: of_keys(cut, x.roll(1, -1)))
    values = solve(problem, "triton", torch.float32, device)
    assert relative_error(values["d_q"], references["d_q"]) > 0.1
