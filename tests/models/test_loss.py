"""The loss in chunks against PyTorch's over all logits in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import BOUNDS, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lasp.models.loss import cross_entropy_sum, default_chunk_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, D, VOCAB = 50, 32, 90
# Not one: what the gradients are multiplied with must arrive.
D_LOSS = 0.3


def problem(dtype: torch.dtype = torch.float64, tokens: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [tokens, D], weight [VOCAB, D] and labels [tokens], ignored at both ends of a chunk of 13."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (tokens, VOCAB))
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    labels[[0, 12, 13, tokens - 1]] = -100
    hidden, weight = (t.to(DEVICE, dtype).requires_grad_() for t in (hidden, weight))
    return hidden, weight, labels.to(DEVICE)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        (hidden @ weight.mT).to(torch.promote_types(hidden.dtype, torch.float32)), labels, reduction="sum"
    )


def results(loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return loss, *torch.autograd.grad(loss * D_LOSS, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunks_are_the_whole(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = results(plain(*wide, labels), *wide)  # type: ignore[call-arg]
    for chunk_tokens in (1, 13, 1000):
        found = results(cross_entropy_sum(hidden, weight, labels, chunk_tokens=chunk_tokens), hidden, weight)
        assert {t.dtype for t in found} == {dtype}
        assert max(map(relative_error, found, expected)) < BOUNDS[dtype]
    # The control: one label among fifty.
    labels[20] = (labels[20] + 1) % VOCAB
    wrong = results(cross_entropy_sum(hidden, weight, labels), hidden, weight)
    assert min(map(relative_error, wrong, expected)) > 1e-3


@pytest.mark.parametrize("case", ["autocast", "16-bit weights", "sure tokens"])
def test_in_16_bits_it_errs_no_more_than_all_logits_at_once(case: str) -> None:
    """A sum of 2000 chunks would stand still in 16 bits, and p - 1 at the label of a sure token would be nothing."""
    hidden, weight, labels = problem(torch.bfloat16 if case == "16-bit weights" else torch.float32, tokens=2000)
    if case == "sure tokens":
        with torch.no_grad():
            hidden.copy_(F.normalize(weight[labels.clamp(min=0)], dim=-1) * 3)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = results(plain(*wide, labels), *wide)  # type: ignore[call-arg]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=case != "16-bit weights"):
        losses = cross_entropy_sum(hidden, weight, labels, chunk_tokens=1), plain(hidden, weight, labels)
    chunks, whole = (list(map(relative_error, results(loss, hidden, weight), expected)) for loss in losses)
    assert losses[0].dtype == torch.float32
    assert all(ours < 1.1 * theirs for ours, theirs in zip(chunks, whole, strict=True)), (chunks, whole)


def test_logits_are_computed_once_and_gradients_where_wanted() -> None:
    """Matrix products of the forward pass: one, and one for each gradient; the backward pass has none."""
    hidden, weight, labels = problem()

    def products(*wanted: Tensor, grad: bool = True) -> float:
        for tensor in (hidden, weight):
            tensor.requires_grad_(any(tensor is one for one in wanted))
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            loss = cross_entropy_sum(hidden, weight, labels, chunk_tokens=13)
            if loss.requires_grad:
                loss.backward()
        return counter.get_total_flops() / (2 * N * D * VOCAB)

    assert products(hidden, weight) == 3
    assert products(hidden) == products(weight) == 2
    assert products() == products(hidden, weight, grad=False) == 1


def test_ignored_tokens_have_no_part() -> None:
    """Even one that is NaN has none; a rank whose labels are all ignored has gradients of zero."""
    hidden, weight, labels = problem()
    with torch.no_grad():
        hidden[0] = torch.nan
    loss, d_hidden, d_weight = results(cross_entropy_sum(hidden, weight, labels), hidden, weight)
    assert loss.isfinite() and d_hidden.isfinite().all() and d_weight.isfinite().all()
    assert not d_hidden[labels == -100].any() and d_hidden[labels != -100].any(1).all()
    nothing = cross_entropy_sum(hidden, weight, torch.full_like(labels, -100))
    assert not any(t.any() for t in results(nothing, hidden, weight))


def test_what_it_cannot_do_it_refuses() -> None:
    hidden, weight, labels = problem(torch.float32)
    loss = cross_entropy_sum(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(cross_entropy_sum(hidden, weight, labels), weight, create_graph=True)
    with pytest.raises(ValueError, match=r"one dtype, got torch.float64 and torch.float32"):
        cross_entropy_sum(hidden.double(), weight, labels)


def test_a_chunk_is_bounded_by_its_logits() -> None:
    assert default_chunk_tokens(50_272, on_gpu=True) * 50_272 <= 1 << 27
    assert default_chunk_tokens(50_272, on_gpu=True, fused=True) * 50_272 <= 1 << 28
    assert default_chunk_tokens(50_272, on_gpu=False) * 50_272 <= 1 << 24
    assert default_chunk_tokens(1_000_000, on_gpu=True) == 2048
