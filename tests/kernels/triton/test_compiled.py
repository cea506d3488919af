"""torch.compile over the public operator: one graph, no breaks, the eager gradients."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from kernels.triton.compiled_blocks import STEPS
from problems import GATES, make
from tolerances import relative_error
from torch import Tensor
from torch._dynamo.utils import counters

import lasp
from lasp.models import NAMES
from lasp.ops.compiled import ALONE, scan_forward
from lasp.recurrence.kept import kept, restored

BLOCKS = Path(__file__).parent / "compiled_blocks.py"
DIMS = {"batch": 1, "tokens": 70, "heads": 1, "value_heads": 2, "keys": 16, "values": 16}
# The kind of decay; whether of a delta rule.
CASES = [*((gate, False) for gate in GATES), ("scalar", True), ("channel", True)]


def leaves_of(gate: str, device: torch.device, delta: bool = False) -> tuple[list[Tensor | None], Tensor]:
    """q, k, v, beta (of the delta rule), g, an erase key (with a gate per token) and the initial state; the gradient of
    the output."""
    problem = make(gate, **DIMS)
    q, k, v, g, initial = (problem.inputs[name] for name in ("q", "k", "v", "g", "initial_state"))
    beta = torch.rand(v.shape[:3], generator=torch.Generator().manual_seed(0)) if delta else None
    inputs = (q, k, v, beta, g, 0.02 * k.roll(1, 1) if delta and gate == "scalar" else None, initial)
    leaves = [None if t is None else t.to(device, torch.float32).requires_grad_() for t in inputs]
    return leaves, problem.d_o.to(device, torch.float32)


def model(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    r: Tensor | None,
    initial: Tensor | None,
    **more: Any,
) -> Tensor:
    ways: dict[str, Any] = {"initial_state": initial, "output_final_state": True, "backend": "triton", **more}
    if beta is None:
        o, final = lasp.linear_attention(q * 2.0, k, v, g, **ways)
    else:
        o, final = lasp.delta_rule(q * 2.0, k, v, beta, g, **ways, erase_key=r, normalize_qk=r is None)
    return o * final.sum()


def gradients(output: Tensor, leaves: list[Tensor | None], d_o: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None and leaf.requires_grad], d_o)


@pytest.mark.parametrize(
    ("gate", "delta"), [*CASES[2:5], *(pytest.param(*case, marks=pytest.mark.ci) for case in (*CASES[:2], CASES[5]))]
)
def test_compiles_without_breaks(gate: str, delta: bool, device: torch.device) -> None:
    leaves, d_o = leaves_of(gate, device, delta)
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
    leaves[4].requires_grad_(False)
    leaves[6] = None
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


@pytest.mark.parametrize(
    ("gate", "delta"),
    [("constant", False), *(pytest.param(*case, marks=pytest.mark.ci) for case in (CASES[2], CASES[3], CASES[5]))],
)
def test_packed_documents_are_part_of_the_graph(gate: str, delta: bool, device: torch.device) -> None:
    """Given as a tensor, whose numbers may be others each time, with states or without; a graph for each number of
    documents. The control: that they are others shows."""
    leaves, d_o = leaves_of(gate, device, delta)

    def packed(bounds: Tensor, *inputs: Tensor | None) -> Tensor:
        return model(*inputs, cu_seqlens=bounds)  # type: ignore[arg-type]

    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=False)
    outputs, state = [], leaves[6]
    assert state is not None
    # A sample in every run: what is compiled is the same for all.
    for bounds in ([0, 3, 30, 30, 70], [0, 0, 40, 69, 70], [0, 35, 70])[: 2 if gate == "constant" else 3]:
        leaves[6] = state.detach().repeat(4, 1, 1, 1).requires_grad_() if len(bounds) == 5 else None
        eager, compiled = (each(torch.tensor(bounds), *leaves) for each in (packed, run))
        outputs.append(compiled)
        found, expected = ((y.detach(), *gradients(y, leaves, d_o)) for y in (compiled, eager))
        for got, reference in zip(found, expected, strict=True):
            assert torch.equal(got, reference)
    assert counters["stats"]["unique_graphs"] == (1 if gate == "constant" else 2)
    assert relative_error(outputs[0], outputs[1]) > 0.1
    with pytest.raises(ValueError, match="must rise from 0 to the 70 tokens"):
        run(torch.tensor([*bounds[:-1], 71]), *leaves)


SAMPLE, ALL = [("retnet", 1), ("hybrid", 2)], [(family, ranks) for family in NAMES for ranks in (1, 2)]


@pytest.mark.parametrize(
    ("family", "ranks"),
    [pytest.param(*case, marks=pytest.mark.ci if case in SAMPLE else pytest.mark.exhaustive) for case in ALL],
)
def test_blocks_of_any_documents_and_any_number_of_tokens(family: str, ranks: int, device: torch.device) -> None:
    """Two graphs with documents and two without: of the first number of tokens, and of any (of hybrid, softmax layers
    alone). Over ranks nothing is sent twice, recomputed parts or not. The controls: documents matter, graphs count."""
    done = forked.run([sys.executable, str(BLOCKS), device.type, family, str(ranks)], timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    for steps in json.loads(done.stdout.splitlines()[-1]):
        for (*_, graphs), (error, control, found, (sent, sent_by_other)) in zip(STEPS, steps, strict=True):
            assert error <= 1e-5 and control > 0.1 and found == graphs, steps
            assert sent == sent_by_other and (sent > 0) == (ranks > 1), steps


@pytest.mark.parametrize(("gate", "delta"), CASES)
def test_operator_contract(gate: str, delta: bool, device: torch.device) -> None:
    """Schema, fake shapes and autograd registration, as PyTorch checks them."""
    (*leaves, initial), _ = leaves_of(gate, device, delta)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = (*leaves, None, None, None, initial)
    torch.library.opcheck(
        scan_forward, (*given, 0.25, delta and gate != "scalar", gate != "none", True, ALONE, True), test_utils=tests
    )


@pytest.mark.parametrize("sized", [True, False])
def test_what_is_saved_comes_back_or_says_that_it_was_copied(sized: bool, device: torch.device) -> None:
    states = torch.randn(2, 3, 4, device=device), torch.arange(5, dtype=torch.int32, device=device)
    given = [*states, torch.empty(0, 7, device=device), states[0].bfloat16()[1:]]
    saved = kept(given, 6, sized=sized)
    assert len(saved) == 7 and all((part.numel() == 1) != sized for part in saved[1:])
    for value, each in zip(restored(saved), given, strict=True):
        assert torch.equal(value, each) and value.dtype == each.dtype
    copied = [part.clone() for part in saved]
    if sized:
        assert torch.equal(restored(copied)[0], states[0])
    else:
        with pytest.raises(RuntimeError, match="cannot have its saved tensors copied"):
            restored(copied)
