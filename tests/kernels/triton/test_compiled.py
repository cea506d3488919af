"""torch.compile over the operators: one graph, no breaks, the eager gradients."""

from __future__ import annotations

import pytest
import torch
from problems import GATES, make
from torch import Tensor
from torch._dynamo.utils import counters

from lasp.kernels.triton.decay.operators import decay_forward, linear_attention
from lasp.recurrence.contract import Run

DIMS = {"batch": 1, "tokens": 70, "heads": 1, "value_heads": 2, "keys": 16, "values": 16}


def leaves_of(gate: str) -> tuple[list[Tensor | None], Tensor]:
    problem = make(gate, **DIMS)
    names = ("q", "k", "v", "g", "initial_state")
    leaves = [None if (t := problem.inputs[name]) is None else t.float().requires_grad_() for name in names]
    return leaves, problem.d_o.float()


def model(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor) -> Tensor:
    o, final = linear_attention(Run(q * 2.0, k, v, g, 0.25), initial)
    return o * final.sum()


@pytest.mark.parametrize("gate", GATES)
def test_compiles_without_breaks(gate: str) -> None:
    leaves, d_o = leaves_of(gate)
    wanted = [leaf for leaf in leaves if leaf is not None]
    eager = model(*leaves)
    expected = torch.autograd.grad(eager, wanted, d_o)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*leaves)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(compiled, eager)
    for got, reference in zip(torch.autograd.grad(compiled, wanted, d_o), expected, strict=True):
        assert torch.equal(got, reference)


@pytest.mark.parametrize("gate", GATES)
def test_operator_contract(gate: str) -> None:
    """Schema, fake shapes and autograd registration, as PyTorch checks them."""
    leaves, _ = leaves_of(gate)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(decay_forward, (*leaves, 0.25), test_utils=tests)
