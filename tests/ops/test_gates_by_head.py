"""The gradient of gates and betas by the PyTorch backend, head by head: per token, and summed over tokens.

A head that forgets within a few tokens has a small gradient, which a whole tensor's error would hide.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import BOUNDS, relative_error
from torch import Tensor

import lasp
from lasp.algebra import Dense
from lasp.kernels.reference.tokens import Erasure
from lasp.kernels.torch import delta

RATES = torch.tensor((-1e-3, -0.1, -1.6, -6.0, -16.0))
B, T, D = 4, 200, 16


def gradients(x: dict[str, Tensor], d_o: Tensor, dtype: torch.dtype, backend: str = "torch") -> dict[str, Tensor]:
    """Returns those of g, and of beta if there is one: of the delta rule, else of linear attention."""
    leaves: dict[str, Any] = {name: tensor.to(dtype, copy=True) for name, tensor in x.items()}
    wanted = {name: leaf.requires_grad_() for name, leaf in leaves.items() if name in ("g", "beta")}
    o, _ = (lasp.delta_rule if "beta" in x else lasp.linear_attention)(**leaves, backend=backend)
    return dict(zip(wanted, torch.autograd.grad(o, list(wanted.values()), d_o.to(dtype)), strict=True))


def problem(has_beta: bool, per_channel: bool, channels: int = D, tokens: int = T) -> tuple[dict[str, Tensor], Tensor]:
    random = torch.Generator().manual_seed(0)
    shape = (B, tokens, len(RATES), channels)
    q, k = (torch.randn(shape, generator=random) for _ in range(2))
    v, d_o = (torch.randn(*shape[:3], D, generator=random) for _ in range(2))
    rates = RATES[:, None] if per_channel else RATES
    x = {"q": q, "k": k, "v": v, "g": rates * 2 * torch.rand(shape if per_channel else shape[:3], generator=random)}
    if has_beta:
        x |= {"k": torch.nn.functional.normalize(k, dim=-1), "beta": torch.rand(shape[:3], generator=random)}
    return x, d_o


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("has_beta", [False, True])
def test_every_head(has_beta: bool, per_channel: bool) -> None:
    x, d_o = problem(has_beta, per_channel)
    found, expected = gradients(x, d_o, torch.float32), gradients(x, d_o, torch.float64)
    for name, reference in expected.items():
        for of_head, of_reference in zip(found[name].unbind(2), reference.unbind(2), strict=True):
            assert relative_error(of_head, of_reference) <= BOUNDS[torch.float32], name
            assert relative_error(of_head.double().sum(1), of_reference.sum(1)) <= BOUNDS[torch.float32], name
    # The control: an error of the whole tensor's rounding is seen in the head that forgets most.
    reference = expected["g"]
    off = found["g"] + torch.finfo(torch.float32).eps * reference.norm() / reference.numel() ** 0.5
    assert relative_error(off.double().sum(1)[:, -1], reference.sum(1)[:, -1]) > BOUNDS[torch.float32]


def test_what_a_token_erases_keeps_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares the definition in fp32. The control is a token's transition as a matrix: of keys of 256 channels that is
    next to one, to whose digits it rounds what is erased."""
    x, d_o = problem(has_beta=True, per_channel=False, channels=256, tokens=24)
    x, d_o = {name: tensor[:1, :, :2] for name, tensor in x.items()}, d_o[:1, :, :2]
    expected = gradients(x, d_o, torch.float64, "reference")

    def error() -> float:
        found = gradients(x, d_o, torch.float32, "reference")
        return max(
            relative_error(found[name][:, :, head], expected[name][:, :, head]) for name in found for head in (0, 1)
        )

    assert error() <= 5e-7
    apply = Erasure.apply
    monkeypatch.setattr(Erasure, "apply", lambda token, state: apply(token, Dense.identity(state).matrix) @ state)
    assert error() > 5e-7


@pytest.mark.parametrize("channels", [1, 2])
def test_a_chunk_of_many_more_tokens_than_channels(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delta rule has then erased most of what the chunk wrote, and pairs of its tokens cancel."""
    x, d_o = problem(has_beta=True, per_channel=True, channels=channels)
    x["g"] = 1e-4 * x["g"] / RATES[:, None].abs()
    x["beta"] *= 2
    expected = gradients(x, d_o, torch.float64)

    def error() -> float:
        found = gradients(x, d_o, torch.float32)
        return max(
            relative_error(f, e)
            for name in expected
            for f, e in zip(found[name].unbind(2), expected[name].unbind(2), strict=True)
        )

    assert error() <= BOUNDS[torch.float32]
    monkeypatch.setattr(delta, "CHUNK_PER_CHANNEL", delta.CHUNK)
    assert error() > BOUNDS[torch.float32]


def test_a_chunk_has_at_most_so_many_tokens_a_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes channels that are no power of two: rounded up, tokens were up to twice as many, as in the control."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(1, 63, 8, 5, generator=random), dim=-1) for _ in "qk")
    x = {
        "q": q,
        "k": k,
        "v": torch.randn(1, 63, 8, 64, generator=random),
        "beta": torch.rand(1, 63, 8, generator=random),
    }
    x["g"] = torch.tensor([-1e-7, -0.01, -0.1, -8.0] * 2) * torch.rand(1, 63, 8, generator=random)
    d_o, d_final = torch.randn(1, 63, 8, 64, generator=random), torch.randn(1, 8, 5, 64, generator=random)

    def gate_gradient(dtype: torch.dtype) -> Tensor:
        leaves: dict[str, Any] = {name: tensor.to(dtype).requires_grad_(name == "g") for name, tensor in x.items()}
        o, final = lasp.delta_rule(**leaves, output_final_state=True, backend="torch")
        return torch.autograd.grad((o, final), leaves["g"], (d_o.to(dtype), d_final.to(dtype)))[0]

    expected = gate_gradient(torch.float64)
    assert relative_error(gate_gradient(torch.float32), expected) < 5e-7
    monkeypatch.setattr(delta, "CHUNK_PER_CHANNEL", 2 * delta.CHUNK_PER_CHANNEL)
    assert relative_error(gate_gradient(torch.float32), expected) > 5e-7


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_gate_that_forgets_all_costs_slow_ones_no_digits(per_channel: bool) -> None:
    """Compares in fp64, where sums of both would lose what is asked for."""
    x, d_o = problem(has_beta=False, per_channel=per_channel, tokens=64)
    x["g"][:, ::2] = -torch.inf
    x["g"][:, 1::4] *= 1e-3
    x["g"][:, 0] = -1e4
    found, expected = gradients(x, d_o, torch.float64)["g"], gradients(x, d_o, torch.float64, "reference")["g"]
    # exp(-inf) has a zero derivative, which the reference's autograd cannot form as 0 * inf.
    expected = expected.masked_fill(x["g"] == -torch.inf, 0.0)
    for of_head, of_reference in zip(found.unbind(2), expected.unbind(2), strict=True):
        assert relative_error(of_head, of_reference) <= BOUNDS[torch.float64]
    assert relative_error(found[:, :, 0] * (1 + 4e-12), expected[:, :, 0]) > BOUNDS[torch.float64]
