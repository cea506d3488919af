"""Whole runs from zero: short ones, whose sweeps gather the states of their segments, and longer ones.

Against the PyTorch backend in fp64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import relative_error
from torch import Tensor

import lasp
from lasp.kernels.triton.common.decays import CHANNEL, HEAD, TOKEN
from lasp.kernels.triton.decay import plan as plans
from lasp.kernels.triton.decay import runs
from lasp.kernels.triton.decay.stages import STAGES as fused
from lasp.recurrence.inputs import DecayInputs

pytestmark = pytest.mark.ci

FP32, BF16 = torch.float32, torch.bfloat16
# Of outputs and gradients, and of a learned constant's: one number a head, a sum of terms that cancel.
BOUNDS = {FP32: (4e-6, 2e-5), BF16: (8e-3, 5e-2)}
# Documents: of a single token, an empty one, a short one, and one of several segments whose last chunk is ragged.
PACKED = (0, 1, 1, 4, 134)


@pytest.fixture(autouse=True)
def _two_chunks_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*arguments: Any) -> plans.LaunchPlan:
        found = plans.plan.__wrapped__(*arguments)
        gathers = found.gathers and arguments[5] != CHANNEL.value
        rows = found.rows and not gathers  # which do not gather
        return found._replace(segment_chunks=2, segments=-(-found.chunks // 2), gathers=gathers, rows=rows)

    monkeypatch.setattr(runs, "plan", cut)
    monkeypatch.setattr(runs, "launches_of", runs.launches_of.__wrapped__)


def problem(kind: str, dtype: torch.dtype, H: int, packed: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    B = 2 if kind == "scalar" and not packed else 1
    T, H_v, D = PACKED[-1], 2, 64 if dtype == BF16 else 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    x = {"q": normal(B, T, H, D), "k": normal(B, T, H, D), "v": normal(B, T, H_v, D)}
    shapes = {"constant": (H_v,), "learned": (H_v,), "scalar": (B, T, H_v), "channel": (B, T, H_v, D)}
    if kind in shapes:
        x["g"] = -0.05 * torch.rand(shapes[kind], generator=random)
    states = len(PACKED) - 1 if packed else B
    return x, normal(B, T, H_v, D), torch.randn(states, H_v, D, D, generator=random)


def solve(
    kind: str, x: dict[str, Tensor], d_o: Tensor, d_final: Tensor | None, packed: bool, backend: str
) -> dict[str, Tensor]:
    """Without a gradient of the final state if d_final is None."""
    leaves: dict[str, Any] = {name: tensor.clone() for name, tensor in x.items()}
    wanted = {n: leaf.requires_grad_() for n, leaf in leaves.items() if n != "g" or kind != "constant"}
    cu_seqlens = PACKED if packed else None
    o, final = lasp.linear_attention(**leaves, output_final_state=True, cu_seqlens=cu_seqlens, backend=backend)
    outputs, gradients = ((o,), (d_o,)) if d_final is None else ((o, final), (d_o, d_final.to(final)))
    found = torch.autograd.grad(outputs, list(wanted.values()), gradients)
    return {"o": o, "final_state": final} | {f"d_{n}": d for n, d in zip(wanted, found, strict=True)}


def check(kind: str, dtype: torch.dtype, H: int, packed: bool, with_final: bool, device: torch.device) -> None:
    x, d_o, d_final = problem(kind, dtype, H, packed)
    d_final = d_final if with_final else None
    there = {name: tensor.to(device) for name, tensor in x.items()}
    values = solve(kind, there, d_o.to(device), None if d_final is None else d_final.to(device), packed, "triton")
    exact = {name: tensor.double() for name, tensor in x.items()}
    references = solve(kind, exact, d_o.double(), None if d_final is None else d_final.double(), packed, "torch")
    for name, reference in references.items():
        bound = BOUNDS[dtype][kind == "learned" and name == "d_g"]
        assert relative_error(values[name].cpu(), reference) <= bound, name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["none", "constant", "learned", "scalar"])
def test_grouped_heads(kind: str, packed: bool, device: torch.device) -> None:
    check(kind, FP32, 1, packed, True, device)


@pytest.mark.parametrize(("kind", "packed"), [("constant", False), ("scalar", True)])
def test_without_a_gradient_of_the_final_state(kind: str, packed: bool, device: torch.device) -> None:
    check(kind, FP32, 1, packed, False, device)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["constant", "scalar", "channel"])
def test_with_summaries(kind: str, packed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer runs from zero, as if these were: of the segment that nothing follows none is made."""
    monkeypatch.setattr(plans, "LONGEST_GATHERED", 0)
    check(kind, FP32, 1, packed, False, device)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["constant", "learned", "scalar"])
def test_bf16(kind: str, packed: bool, device: torch.device) -> None:
    """dk and dv in one launch; of decays that are learned, apart, and dq from the states that forward left."""
    check(kind, BF16, 2, packed, True, device)


@pytest.mark.parametrize(("dtype", "H", "packed", "with_final"), [(FP32, 1, False, True), (BF16, 2, True, False)])
def test_whole_runs_of_a_gate_per_channel(
    dtype: torch.dtype, H: int, packed: bool, with_final: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single segment, before which there is nothing: no summaries."""
    monkeypatch.setattr(runs, "plan", plans.plan)
    check("channel", dtype, H, packed, with_final, device)


def test_the_check_sees_a_past_that_is_not_gathered(device: torch.device) -> None:
    """The control: a segment without the tokens before it is far from what it is with them."""
    x, d_o, _ = problem("constant", FP32, 1, False)
    whole = solve("constant", x, d_o, None, False, "torch")["o"][:, 128:]
    late = {name: tensor if tensor.dim() == 1 else tensor[:, 128:] for name, tensor in x.items()}
    alone = solve("constant", late, d_o[:, 128:], None, False, "torch")["o"]
    assert relative_error(alone, whole) > 0.1


def test_where_states_are_gathered() -> None:
    """Whole short runs from zero; of gates per token shorter ones, or enough to fill a device uncut. Not what ranks
    share. Of gates per channel, where one segment holds all."""
    h100 = (132, 232448, True)

    def gathers(tokens: int, heads: int, kind: int = HEAD.value, from_zero: bool = True) -> bool:
        return plans.plan(tokens, heads, 128, 128, BF16, kind, *h100, from_zero).gathers

    assert gathers(1024, 16) and gathers(2048, 128) and not gathers(4096, 16) and not gathers(65536, 16)
    assert gathers(512, 16, TOKEN.value) and gathers(2048, 128, TOKEN.value) and not gathers(1024, 16, TOKEN.value)
    assert not gathers(1024, 16, from_zero=False) and not gathers(256, 16, CHANNEL.value, False)
    assert (
        gathers(512, 16, CHANNEL.value) and gathers(2048, 256, CHANNEL.value) and not gathers(1024, 16, CHANNEL.value)
    )

    def keeps(tokens: int, heads: int, kind: int = TOKEN.value) -> bool:
        return plans.keeps_states(plans.plan(tokens, heads, 128, 128, BF16, kind, *h100, True), True)

    # For a decay's gradient, but of runs that are single segments.
    assert keeps(512, 16) and keeps(65536, 16) and not keeps(2048, 256) and not keeps(512, 16, CHANNEL.value)


def test_an_initial_state_is_no_start_from_zero(device: torch.device) -> None:
    x, _, _ = problem("constant", FP32, 1, False)
    run = DecayInputs(*(tensor.to(device) for tensor in x.values()), 1.0)  # type: ignore[arg-type, call-arg]
    assert fused.prepare(run, True).launches.plan.gathers and not fused.prepare(run, False).launches.plan.gathers
