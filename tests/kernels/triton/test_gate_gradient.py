"""The gradient of decays that forget, head by head: a head that forgets within a few tokens has a small gradient, which
is lost in rounding where large sums are subtracted, and in a whole tensor's error.

Per token, and summed over tokens as a constant's gradient is, or that of what gates are made of. Against the PyTorch
backend in fp64; the sums of several sequences together, since one may be small by chance.
"""

from __future__ import annotations

from itertools import accumulate, pairwise, product
from typing import Any

import pytest
import torch
from tolerances import relative_error
from torch import Tensor

import lasp

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Per token, and summed.
BOUNDS = {BF16: (5e-3, 8e-3), FP16: (1e-3, 1.5e-3), FP32: (2e-6, 2e-6)}
# Of a constant's, one number a head, relative to what single sequences add to it.
D_CONSTANT = {BF16: 2e-2, FP32: 2e-6}
TOKENS, DIM = 200, 16
RATES = (-1e-3, -0.1, -1.6, -6.0, -16.0)
# Within some chunks, down to a few tokens.
SLOW_TOKENS = 704
SLOW = (-0.02, -0.03, -0.1, -0.3)
# From one token to the next; fp16 has no numbers for the last.
FORGET = (-1.6, -6.0, -12.0, -30.0)
# By sweeps whose products are exact, and others.
QUICK = (("scalar", FP32), ("channel", BF16))
KINDS = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.ci)
    for case in product(("scalar", "channel"), BOUNDS)
]


def problem(
    kind: str, dtype: torch.dtype, tokens: int = TOKENS, batch: int = 2, rates: tuple[float, ...] = RATES
) -> tuple[dict[str, Tensor], Tensor]:
    """A head for each rate; gates per token and channel are between none and twice that."""
    random = torch.Generator().manual_seed(0)
    shape = (batch, tokens, len(rates), DIM)
    q, k, v, d_o = (torch.randn(shape, generator=random).to(dtype) for _ in range(4))
    means = torch.tensor(rates)
    if kind == "constant":
        g = means
    elif kind == "scalar":
        g = means * 2 * torch.rand(shape[:3], generator=random)
    else:
        g = means[:, None] * 2 * torch.rand(shape, generator=random)
    return {"q": q, "k": k, "v": v, "g": g}, d_o


def gate_gradient(
    x: dict[str, Tensor], d_o: Tensor, backend: str, d_final: Tensor | None = None, **options: Any
) -> Tensor:
    leaves: dict[str, Any] = {name: tensor.detach().requires_grad_(name == "g") for name, tensor in x.items()}
    o, final = lasp.linear_attention(**leaves, backend=backend, output_final_state=d_final is not None, **options)
    if d_final is None:
        return torch.autograd.grad(o, leaves["g"], d_o.to(o))[0].cpu()
    return torch.autograd.grad((o, final), leaves["g"], (d_o.to(o), d_final.to(final)))[0].cpu()


def errors_by_head(found: Tensor, expected: Tensor) -> list[tuple[float, float]]:
    """Per token and summed, of gates per token or channel [B, T, H, ...]."""
    heads = zip(found.unbind(2), expected.unbind(2), strict=True)
    return [(relative_error(f, e), relative_error(f.double().sum(1), e.sum(1))) for f, e in heads]


def expectation(x: dict[str, Tensor], d_o: Tensor, **options: Any) -> Tensor:
    return gate_gradient({name: tensor.double() for name, tensor in x.items()}, d_o.double(), "torch", **options)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("scalar", BF16), ("scalar", FP16), ("scalar", FP32), ("channel", BF16), ("channel", FP16), ("channel", FP32)],
    ids=str,
)
def test_every_head(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    x, d_o = problem(kind, dtype)
    expected = expectation(x, d_o)
    found = gate_gradient({name: tensor.to(device) for name, tensor in x.items()}, d_o.to(device), "triton")
    errors = errors_by_head(found, expected)
    for error, bound in zip(zip(*errors, strict=True), BOUNDS[dtype], strict=True):
        assert max(error) <= bound, errors
    # The control: what rounding would add to sums of what does, and does not, cross a token.
    noise = DIM * torch.finfo(dtype).eps * torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for error, bound in zip(
        zip(*errors_by_head(found + noise.cumsum(1), expected), strict=True), BOUNDS[dtype], strict=True
    ):
        assert max(error) > bound


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("scalar", BF16),
        ("scalar", FP16),
        ("channel", BF16),
        pytest.param("channel", FP16, marks=pytest.mark.ci),
        pytest.param("channel", FP32, marks=pytest.mark.ci),
    ],
    ids=str,
)
def test_every_head_that_forgets_within_chunks(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Compares where what passes a chunk is followed to the next: of its sum over tokens rounding is most."""
    x, d_o = problem(kind, dtype, tokens=SLOW_TOKENS, rates=SLOW)
    expected = expectation(x, d_o)
    found = gate_gradient({name: tensor.to(device) for name, tensor in x.items()}, d_o.to(device), "triton")
    errors = errors_by_head(found, expected)
    assert max(max(pair) for pair in errors) <= BOUNDS[dtype][1], errors
    # The control: a rounding that each chunk hands to the next.
    noise = (
        torch.finfo(dtype).eps
        * expected.std()
        * torch.randn(SLOW_TOKENS // 32, generator=torch.Generator().manual_seed(1))
    )
    shifted = found + noise.cumsum(0).repeat_interleave(32).view(1, -1, *(1,) * (found.dim() - 2))
    assert max(max(pair) for pair in errors_by_head(shifted, expected)) > BOUNDS[dtype][1]


def test_what_passes_chunks_that_let_little_pass(device: torch.device) -> None:
    """Takes fp32: as a difference of what a chunk's tokens read it had no digits, and its rounding was the same at all
    of them. The control is such a rounding."""
    rates = (-0.45, -0.5, -0.55)
    bounds = (0, 37, 420, 450)
    x, d_o = problem("scalar", FP32, tokens=bounds[-1], batch=1, rates=rates)
    expected = expectation(x, d_o, cu_seqlens=bounds)
    found = gate_gradient({name: t.to(device) for name, t in x.items()}, d_o.to(device), "triton", cu_seqlens=bounds)
    random = torch.Generator().manual_seed(1)
    assert max(max(pair) for pair in errors_by_head(found, expected)) <= 5e-7
    noise = torch.finfo(FP32).eps * expected.std() * torch.randn(len(found[0]) // 32 + 1, generator=random)
    shifted = found + noise.repeat_interleave(32)[: len(found[0]), None]
    assert max(summed for _, summed in errors_by_head(shifted, expected)) > 5e-7


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_rounding_of_what_crosses_nothing_is_not_summed(kind: str, device: torch.device) -> None:
    """Takes fp32 where pairs of late tokens, and what the last ones add to a final state, are far larger than what
    crosses most tokens.

    The control is their rounding, taken off and so the same at every token: 2.7e-6 of the sum.
    """
    rates = (-2.0, -4.0, -6.0)
    x, d_o = problem(kind, FP32, tokens=59, batch=1, rates=rates)
    random = torch.Generator().manual_seed(1)
    x["initial_state"], d_final = (torch.randn(1, len(rates), DIM, DIM, generator=random) for _ in range(2))
    expected = expectation(x, d_o, d_final=d_final)
    x = {name: tensor.to(device) for name, tensor in x.items()}
    found = gate_gradient(x, d_o.to(device), "triton", d_final.to(device))
    assert max(max(pair) for pair in errors_by_head(found, expected)) <= 2e-6
    shifted = found + torch.finfo(FP32).eps * expected.abs().amax(1, keepdim=True)
    assert max(summed for _, summed in errors_by_head(shifted, expected)) > 2e-6


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_learned_constant(dtype: torch.dtype, device: torch.device) -> None:
    x, d_o = problem("constant", dtype)
    per_token = x | {"g": x["g"].expand(*d_o.shape[:3]).contiguous()}
    size = expectation(per_token, d_o).sum(1).norm(dim=0)
    found = gate_gradient({name: tensor.to(device) for name, tensor in x.items()}, d_o.to(device), "triton")
    errors = ((found - expectation(x, d_o)).abs() / size).tolist()
    assert max(errors) <= D_CONSTANT[dtype], errors


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=str)
def test_next_to_nothing_beside_the_gradient_of_a_state(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Documents of few tokens, all of which forget: what the last one adds to the final state crosses no gate, and is
    far larger than what does."""
    lengths = (1,) * 4 + (2,) * 2 + (4,) + (67,)  # the last one a few tokens longer than a chunk
    rates = FORGET[:2] if dtype == FP16 else FORGET
    bounds = (0, *accumulate(lengths))
    x, d_o = problem(kind, dtype, bounds[-1], batch=1, rates=rates)
    x["g"] = torch.tensor(rates).view(-1, *(1,) * (x["g"].dim() - 3)).expand(x["g"].shape).contiguous()
    random = torch.Generator().manual_seed(1)
    shape = (len(lengths), len(rates), DIM, DIM)
    x["initial_state"], d_final = (torch.randn(shape, generator=random) for _ in range(2))
    expected = expectation(x, d_o, d_final=d_final, cu_seqlens=bounds)
    x = {name: tensor.to(device) for name, tensor in x.items()}
    found = gate_gradient(x, d_o.to(device), "triton", d_final.to(device), cu_seqlens=bounds)
    for start, end in pairwise((0, 4, 8, 12, 79)):
        errors = [error for error, _ in errors_by_head(found[:, start:end], expected[:, start:end])]
        assert max(errors) <= BOUNDS[dtype][1], (start, errors)
    # The control: one rounding of what is added to the final state, which cancels.
    noise = torch.finfo(dtype).eps * torch.randn(found.shape, generator=random)
    assert errors_by_head(found + noise, expected)[-1][0] > BOUNDS[dtype][1]


# A document of a single token, an empty one, a short one, and one of several chunks.
PACKED = (0, 1, 1, 4, 70)


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=str)
def test_nothing_precedes_a_first_token(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """The first decay acts on no state: the gradient is zero, exactly. With an initial state it is not."""
    rates = RATES[::2]
    x, d_o = problem(kind, dtype, PACKED[-1], batch=1, rates=rates)
    x, d_o = {name: tensor.to(device) for name, tensor in x.items()}, d_o.to(device)
    firsts = sorted(set(PACKED[:-1]))
    found = gate_gradient(x, d_o, "triton", cu_seqlens=PACKED)
    assert torch.count_nonzero(found[:, firsts]) == 0
    assert torch.count_nonzero(found[:, 2]) > 0
    alone = {name: tensor[:, :1] for name, tensor in x.items()}
    assert torch.count_nonzero(gate_gradient(alone, d_o[:, :1], "triton")) == 0
    initial = torch.ones(4, len(rates), DIM, DIM, device=device)
    assert torch.count_nonzero(gate_gradient(x, d_o, "triton", cu_seqlens=PACKED, initial_state=initial)[:, firsts]) > 0


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_constant_of_a_single_token(dtype: torch.dtype, device: torch.device) -> None:
    x, d_o = problem("constant", dtype, 1)
    found = gate_gradient({name: tensor.to(device) for name, tensor in x.items()}, d_o.to(device), "triton")
    assert torch.count_nonzero(found) == 0
