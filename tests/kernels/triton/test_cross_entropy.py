"""The loss's kernel: logits to losses and, in their place, gradients, against PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import relative_error
from torch import Tensor

from lasp.kernels.triton.loss import launches
from lasp.models import loss
from lasp.models.loss import cross_entropy_sum

BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
ROWS, VOCAB = 9, 90
IGNORED, SURE, UNKNOWN = 2, 3, 4  # rows


@pytest.fixture(autouse=True)
def rows_of_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "LANES", 4)
    launches._launch.cache_clear()


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [ROWS, VOCAB] and labels; one row far from zero, one sure of its label, one that cannot be some words."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(ROWS, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    logits[0] += 200
    logits[SURE, labels[SURE]] = 26
    logits[5, :70] = -torch.inf
    labels[5] = 80
    labels[IGNORED] = -100
    return logits.to(dtype), labels


@pytest.mark.parametrize("dtype", BOUNDS)
def test_losses_and_gradients(dtype: torch.dtype, device: torch.device) -> None:
    logits, labels = problem(dtype)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    (d_exact,) = torch.autograd.grad(expected.sum(), exact)
    found = logits.to(device, copy=True)
    losses = launches.cross_entropy(found, labels.to(device), -100, gradient=True).cpu()
    d_logits = found.cpu()
    assert relative_error(losses, expected.detach()) <= 1e-6
    assert losses[IGNORED] == 0 and not d_logits[IGNORED].any()
    assert relative_error(d_logits, d_exact) <= BOUNDS[dtype]
    # Not rounded to nothing in 16 bits, as p - 1 would be; the sum is 1 and fp32's last digits.
    d_sure, off = d_exact[SURE, labels[SURE]].abs(), (d_logits - d_exact)[SURE, labels[SURE]].abs()
    assert 1e-5 < d_sure < 1e-4 and off < BOUNDS[dtype] * d_sure + 1.2e-7
    if dtype == torch.float32:
        kept, unknown = logits.to(device, copy=True), labels.index_fill(0, torch.tensor(UNKNOWN), VOCAB)
        scored = launches.cross_entropy(kept, unknown.to(device), -100, gradient=False).cpu()
        assert torch.equal(kept.cpu(), logits) and scored[UNKNOWN].isnan()
        assert torch.equal(scored.nan_to_num(0), losses.index_fill(0, torch.tensor(UNKNOWN), 0.0))


def test_the_loss_by_the_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states come in chunks, the last a short one; an ignored one is NaN."""
    monkeypatch.setattr(loss, "has_fused_kernels", lambda device, dtype: dtype != torch.float64)
    _, labels = problem(torch.float32)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(rows, 8, generator=generator) for rows in (ROWS, VOCAB))
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].mT, labels, reduction="sum")
    hidden[IGNORED] = torch.nan
    leaves = [t.to(device).requires_grad_() for t in (hidden, weight)]
    found = cross_entropy_sum(leaves[0], leaves[1], labels.to(device), chunk_tokens=4)
    assert relative_error(found.cpu(), expected.detach()) <= 1e-6
    gradients = zip(torch.autograd.grad(0.3 * found, leaves), torch.autograd.grad(0.3 * expected, exact), strict=True)
    assert max(relative_error(d.cpu(), wanted) for d, wanted in gradients) <= 2e-6
