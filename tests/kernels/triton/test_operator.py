"""The public operator on the Triton backend: gradients, recomputation, and two ranks, all in fp32."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forked
import pytest
import torch
from problems import GATES, make, solve
from tolerances import relative_error
from torch.utils.checkpoint import checkpoint

import lasp

BOUND = 4e-6  # inputs are rounded to fp32 first, and gradients of a constant decay cancel
TWO_RANKS = Path(__file__).parent / "two_ranks.py"
DIMS = {"batch": 1, "tokens": 70, "heads": 1, "value_heads": 2, "keys": 16, "values": 16}


@pytest.mark.parametrize("gate", GATES)
def test_operator(gate: str, device: torch.device) -> None:
    problem = make(gate, **DIMS)
    values, references = solve(problem, "triton", torch.float32, device), solve(problem, "torch")
    for name, value in values.items():
        assert relative_error(value, references[name]) <= BOUND, name


def test_recomputation_gives_the_same_gradients(device: torch.device) -> None:
    problem = make("scalar", **DIMS)
    leaves = [problem.inputs[name].to(device, torch.float32).requires_grad_() for name in "qkvg"]

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return lasp.linear_attention(*inputs, backend="triton")[0]

    d_o = problem.d_o.to(device, torch.float32)
    plain = torch.autograd.grad(call(*leaves), leaves, d_o)
    recomputed = torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False), leaves, d_o)
    for first, second in zip(plain, recomputed, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("every", "count"),
    [pytest.param((), 80, marks=pytest.mark.ci), pytest.param(("--every",), 111, marks=pytest.mark.exhaustive)],
    ids=["sample", "every"],
)
def test_two_ranks_equal_one(every: tuple[str, ...], count: int, device: torch.device) -> None:
    """Outputs, the final state and every gradient, with shards of unequal length, of packed documents too; compiled, in
    one graph and around a final state, to the last bit."""
    command = [sys.executable, str(TWO_RANKS), device.type, *every]
    done = forked.run(command, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank, errors in enumerate(json.loads(done.stdout.splitlines()[-1])):
        assert len(errors) == count, errors
        bad = {name: error for name, error in errors.items() if not error <= (0 if "compiled" in name else BOUND)}
        assert not bad, (rank, bad)
