"""Gradients that are summed inside over the heads that share q and k, against PyTorch in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gate_gradient import BOUNDS, RATES, SLOW, errors_by_head
from test_weights import inputs, results
from tolerances import relative_error
from torch import Tensor

import lasp
from lasp.kernels.triton.decay import plan as plans
from lasp.kernels.triton.decay import runs
from lasp.kernels.triton.decay.launches import RunShape
from lasp.kernels.triton.decay.scalar.grouped import launches as grouped
from lasp.kernels.triton.decay.scalar.grouped.launches import GroupedLaunches, takes_groups

BF16 = torch.bfloat16


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[GroupedLaunches]:
    """Returns launches that are made, of runs of any length in segments of three chunks, which cut blocks."""
    made: list[GroupedLaunches] = []

    def short(*arguments: object) -> plans.LaunchPlan:
        p = plans.plan(*arguments)  # type: ignore[arg-type]
        return p._replace(segment_chunks=3, segments=-(-p.chunks // 3), gathers=False)

    class Recorded(GroupedLaunches):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(runs, "plan", short)
    monkeypatch.setattr(runs, "launches_of", runs.launches_of.__wrapped__)
    monkeypatch.setattr(grouped, "GroupedLaunches", Recorded)
    monkeypatch.setattr(grouped, "takes_groups", lambda shape, p, *device: takes_groups(shape, p, True, 0))
    return made


@pytest.mark.parametrize(
    ("shape", "from_zero"),
    [((390, 1, 8, 128, 64), False), pytest.param((577, 2, 16, 64, 64), True, marks=pytest.mark.ci)],
)
def test_gradients_of_heads_that_share_keys(
    shape: tuple[int, ...], from_zero: bool, device: torch.device, taken: list[GroupedLaunches]
) -> None:
    """Compare them with weights and skips; the control: the same of weights that are another token's."""
    x = inputs(*shape, 1, BF16)  # type: ignore[arg-type]
    if from_zero:
        del x["initial_state"]
    expected = results({name: tensor.double() for name, tensor in x.items()}, BF16, "torch", None, False)

    def errors() -> dict[str, float]:
        found = results({name: tensor.to(device) for name, tensor in x.items()}, BF16, "triton", None, False)
        return {name: relative_error(found[name].cpu(), tensor) for name, tensor in expected.items()}

    right = errors()
    assert taken and max(right.values()) <= 4e-3, right
    x["log_weight"] = x["log_weight"].roll(1, 1)
    moved = errors()
    assert min(moved[name] for name in ("d_q", "d_k", "d_v", "d_g", "d_log_weight")) > 0.1, moved


def test_every_head_that_shares_keys(device: torch.device, taken: list[GroupedLaunches]) -> None:
    """Compare gates' gradients head by head, per token and summed; the control: what a rounding at every block adds."""
    random = torch.Generator().manual_seed(0)
    rates = torch.tensor([*RATES, *SLOW])
    B, T, heads, K, V = 2, 333, len(rates), 64, 64

    def normal(*shape: int) -> Tensor:
        return torch.randn(B, T, *shape, generator=random).to(BF16)

    x = {"q": normal(1, K), "k": normal(1, K), "v": normal(heads, V)}
    d_o, d_final = normal(heads, V), torch.randn(B, heads, K, V, generator=random)
    x["g"] = rates * 2 * torch.rand(B, T, heads, generator=random)

    def gate_gradient(dtype: torch.dtype | None, backend: str, device: torch.device) -> Tensor:
        leaves = {name: t.to(device, dtype or t.dtype).requires_grad_(name == "g") for name, t in x.items()}
        outputs = lasp.linear_attention(**leaves, backend=backend, output_final_state=True)  # type: ignore[arg-type]
        d = [t.to(o) for t, o in zip((d_o, d_final), outputs, strict=True)]
        return torch.autograd.grad(outputs, leaves["g"], d)[0].cpu()  # type: ignore[arg-type]

    expected, found = gate_gradient(torch.float64, "torch", torch.device("cpu")), gate_gradient(None, "triton", device)
    per_token, summed = zip(*errors_by_head(found, expected), strict=True)
    bound = BOUNDS[BF16]
    assert taken and max(per_token) <= bound[0] and max(summed) <= bound[1], (per_token, summed)
    blocks = torch.randn(B, -(-T // 128), heads, generator=random).repeat_interleave(128, 1)[:, :T]
    noise = 4 * torch.finfo(BF16).eps * expected.std((0, 1)) * blocks
    assert min(error for error, _ in errors_by_head(found + noise, expected)) > bound[0]


def test_runs_that_are_summed_inside() -> None:
    """Name those that are, and one change each that makes others of them."""
    shape = RunShape((1, 32768, 1, 128), (1, 32768, 64, 64), BF16, plans.TOKEN, True, 1.0, weighs=True)
    p = plans.plan(32768, 64, 128, 64, BF16, plans.TOKEN, 132, 232448, True)
    assert takes_groups(shape, p, True, 132) and takes_groups(shape._replace(weighs=False), p, True, 132)
    others = [
        {"q": (1, 32768, 16, 128)}, {"q": (1, 32768, 1, 96)}, {"v": (1, 32768, 64, 256)},
        {"dtype": torch.float16}, {"kind": plans.HEAD}, {"with_decay": False},
    ]  # fmt: skip
    assert not any(takes_groups(shape._replace(**change), p, True, 132) for change in others)  # type: ignore[arg-type]
    short = plans.plan(4096, 64, 128, 64, BF16, plans.TOKEN, 132, 232448, True)
    assert not takes_groups(shape, short, True, 132) and not takes_groups(shape, p, False, 132)
    assert not takes_groups(shape, p._replace(gathers=True), True, 132)
