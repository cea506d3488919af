"""The loss of a shard's logits, without wide copies of them, against PyTorch's of all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import BOUNDS, relative_error

from lasp.hf.loss import cross_entropy_of_logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_of_logits(dtype: torch.dtype) -> None:
    """Compares in chunks that do not divide the tokens; with a token that is nearly sure, and NaN where no label is."""
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(37, 50, generator=random, dtype=torch.float64)
    labels = torch.randint(50, (37,), generator=random).masked_fill(torch.arange(37) % 5 == 0, -100)
    logits[1, labels[1]] = 60.0
    exact = logits.clone().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="sum")
    (3 * expected).backward()
    given = logits.to(dtype)
    given[0] = torch.nan
    given.requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = cross_entropy_of_logits(given, labels, chunk_tokens=8)
    (3 * loss).backward()
    assert relative_error(loss, expected) < BOUNDS[dtype]
    assert relative_error(given.grad, exact.grad) < BOUNDS[dtype]
    # Beside the logits and labels, which are there anyway: a number a token.
    others = [tensor for tensor in kept if tensor.data_ptr() not in (given.data_ptr(), labels.data_ptr())]
    assert sum(tensor.numel() for tensor in others) <= len(labels)
    # The sure token's gradient is small, and right.
    assert relative_error(given.grad[1, labels[1]], exact.grad[1, labels[1]]) < 1e-5


def test_sixteen_bits() -> None:
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    labels = torch.arange(40) % 30
    loss = cross_entropy_of_logits(logits, labels)
    (ours,) = torch.autograd.grad(loss, logits)
    expected = F.cross_entropy(logits.float(), labels, reduction="sum")
    (theirs,) = torch.autograd.grad(expected, logits)
    assert loss.dtype == torch.float32 and relative_error(loss, expected) < 1e-6
    assert ours.dtype == torch.bfloat16 and relative_error(ours, theirs) < 1e-3
