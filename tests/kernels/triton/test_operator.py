"""The public operator on the Triton backend: gradients, recomputation, and two ranks, all in fp32."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from problems import GATES, make, solve
from tolerances import relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lasp
from lasp.kernels.triton.common.launch import BoundKernel
from lasp.kernels.triton.decay import runs

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


class Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), ways: Any = None) -> Any:
        self.count += "empty" in str(function)
        return function(*given, **(ways or {}))


@pytest.mark.parametrize(("gate", "launches", "tensors"), [("none", 3, 5), ("scalar", 7, 10), ("channel", 9, 16)])
def test_what_the_host_does_for_a_short_sequence(
    gate: str, launches: int, tensors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each launch and each allocation takes the host as long as 1 to 2 % of such a call: as few as were measured."""
    g = {"none": None, "scalar": -torch.rand(1, 16, 2), "channel": -torch.rand(1, 16, 2, 16)}[gate]
    q, k, v, d_o = (torch.randn(1, 16, 2, 16, device=device, dtype=torch.bfloat16) for _ in range(4))
    wanted = [t.to(device).requires_grad_() for t in (q, k, v, g) if t is not None]
    run, allocations, launched = BoundKernel.run, Allocations(), []

    def noted(kernel: BoundKernel, given: dict[str, torch.Tensor | None]) -> None:
        before = allocations.count
        run(kernel, given)
        launched.append(kernel)
        allocations.count = before  # without the interpreter's own

    monkeypatch.setattr(BoundKernel, "run", noted)
    runs.launches_of.cache_clear()  # the first launches of each are seen
    with torch.autograd.set_multithreading_enabled(False), allocations:
        torch.autograd.grad(lasp.linear_attention(*wanted, backend="triton")[0], wanted, d_o)
    assert (len(launched), allocations.count) == (launches, tensors)


@pytest.mark.parametrize(
    ("every", "count"),
    [pytest.param((), 102, marks=pytest.mark.ci), pytest.param(("--every",), 170, marks=pytest.mark.exhaustive)],
    ids=["sample", "every"],
)
def test_two_ranks_equal_one(every: tuple[str, ...], count: int, device: torch.device) -> None:
    """Outputs, the final state and every gradient, with shards of unequal length, of packed documents too; compiled, in
    one graph, to the last bit."""
    command = [sys.executable, str(TWO_RANKS), device.type, *every]
    done = forked.run(command, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank, errors in enumerate(json.loads(done.stdout.splitlines()[-1])):
        assert len(errors) == count, errors
        bad = {name: error for name, error in errors.items() if not error <= (0 if "compiled" in name else BOUND)}
        assert not bad, (rank, bad)
