"""torch.compile over the public operator: one graph, no breaks, the eager gradients."""

from __future__ import annotations

import pytest
import torch
from problems import GATES, make
from test_decay import Dims, run
from test_decay import problem as make_run
from tolerances import relative_error
from torch import Tensor
from torch._dynamo.utils import counters

import lasp
from lasp.kernels.triton import decay as fused
from lasp.kernels.triton.decay.operators import decay_forward
from lasp.ops.functional import _scanned
from lasp.ops.scan import TRACEABLE
from lasp.recurrence.contract import Run

DIMS = {"batch": 1, "tokens": 70, "heads": 1, "value_heads": 2, "keys": 16, "values": 16}


def leaves_of(gate: str, device: torch.device) -> tuple[list[Tensor | None], Tensor]:
    problem = make(gate, **DIMS)
    inputs = [problem.inputs[name] for name in ("q", "k", "v", "g", "initial_state")]
    leaves = [None if t is None else t.to(device, torch.float32).requires_grad_() for t in inputs]
    return leaves, problem.d_o.to(device, torch.float32)


def model(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None) -> Tensor:
    o, final = lasp.linear_attention(q * 2.0, k, v, g, initial_state=initial, output_final_state=True, backend="triton")
    return o * final.sum()


def gradients(output: Tensor, leaves: list[Tensor | None], d_o: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None and leaf.requires_grad], d_o)


@pytest.mark.parametrize("gate", GATES)
def test_compiles_without_breaks(gate: str, device: torch.device) -> None:
    leaves, d_o = leaves_of(gate, device)
    eager = model(*leaves)
    expected = gradients(eager, leaves, d_o)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*leaves)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(compiled, eager)
    for got, reference in zip(gradients(compiled, leaves, d_o), expected, strict=True):
        assert torch.equal(got, reference)


def test_compiles_what_is_not_wanted_and_under_autocast(device: torch.device) -> None:
    """Without a gate's gradient and an initial state, from projections that autocast rounds."""
    leaves, d_o = leaves_of("scalar", device)
    leaves[3].requires_grad_(False)
    leaves[4] = None
    weight = torch.eye(16, device=device).requires_grad_()

    def projected(q: Tensor, *others: Tensor | None) -> Tensor:
        with torch.autocast(device.type, dtype=torch.float16):
            k, v = (t @ weight for t in others[:2])
            return model(q @ weight, k, v, *others[2:])

    eager = projected(*leaves)
    torch._dynamo.reset()
    compiled = torch.compile(projected, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled, eager)
    wanted = [*leaves[:3], weight]
    d_o = 0.01 * d_o.half()  # within the range of fp16
    for got, reference in zip(gradients(compiled, wanted, d_o), gradients(eager, wanted, d_o), strict=True):
        assert relative_error(got, reference) <= 2e-3  # what three projections give the weight is added in fp16


@pytest.mark.parametrize(("kind", "heads"), [("none", 1), ("constant", 2), ("scalar", 1), ("channel", 2)])
def test_stages_compile_without_breaks(kind: str, heads: int, device: torch.device) -> None:
    """As torch.compile traces them around an exchange, with grouped heads and with as many of q as of v."""
    p = make_run(kind, Dims(T=40, H=heads), device, torch.float32)
    if kind == "constant":  # learned ones come to the stages per token
        p = p._replace(x=p.x._replace(g=p.x.g.detach()))
    eager = run(fused, p)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: run(fused, p), fullgraph=True, backend="aot_eager")()
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        assert torch.equal(compiled[name], value), name


@pytest.mark.parametrize(("kind", "learned"), [("constant", True), ("constant", False), ("scalar", True)])
def test_compiled_around_an_exchange(kind: str, learned: bool, device: torch.device) -> None:
    """The scan that ranks would share, of one of them: every gradient, also of a learned constant."""
    p = make_run(kind, Dims(T=40), device, torch.float32)
    leaves = [t.detach().requires_grad_() for t in p.x[:3]] + [p.x.g.detach().requires_grad_(learned)]

    def scanned(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        o, final = _scanned(fused, Run(q, k, v, g, 0.25), q, None, True, True, None)
        return o * final.sum()

    eager = scanned(*leaves)
    torch._dynamo.reset()
    compiled = torch.compile(scanned, fullgraph=TRACEABLE, backend="aot_eager")(*leaves)
    assert relative_error(compiled, eager) < 1e-6
    for got, reference in zip(gradients(compiled, leaves, p.d_o), gradients(eager, leaves, p.d_o), strict=True):
        assert relative_error(got, reference) < 1e-5


def test_packed_documents_break_the_graph_and_no_result(device: torch.device) -> None:
    leaves, d_o = leaves_of("scalar", device)
    leaves[4] = None

    def packed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, _: None) -> Tensor:
        return 2.0 * lasp.linear_attention(q, k, v, g, cu_seqlens=(0, 30, 70), backend="triton")[0]

    eager = packed(*leaves)
    torch._dynamo.reset()
    compiled = torch.compile(packed, backend="aot_eager")(*leaves)
    assert torch.equal(compiled, eager)
    for got, reference in zip(gradients(compiled, leaves, d_o), gradients(eager, leaves, d_o), strict=True):
        assert torch.equal(got, reference)


@pytest.mark.parametrize("gate", GATES)
def test_operator_contract(gate: str, device: torch.device) -> None:
    """Schema, fake shapes and autograd registration, as PyTorch checks them."""
    leaves, _ = leaves_of(gate, device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(decay_forward, (*leaves, 0.25), test_utils=tests)
