"""The launch of the loss's kernel."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lasp.kernels.triton.common.launch import Launch, bind
from lasp.kernels.triton.loss.cross_entropy import cross_entropy_kernel

WARPS = 8
LANES, EACH = 256, 16


@lru_cache(maxsize=256)
def _launch(rows: int, vocab: int, dtype: torch.dtype, ignored: int, gradient: bool) -> Launch:
    fixed = {"VOCAB": vocab, "IGNORED": ignored, "GRADIENT": gradient, "LANES": LANES, "EACH": EACH}
    return bind(cross_entropy_kernel, (rows, 1), fixed, warps=WARPS, stages=1)


def cross_entropy(logits: Tensor, labels: Tensor, ignored: int, *, gradient: bool) -> Tensor:
    """fp32 losses [rows] of logits [rows, vocab], dense, which their gradients replace if wanted.

    labels: int64 [rows]; `ignored` for a row without one, whose loss and gradient are zero.
    """
    losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    launch = _launch(*logits.shape, logits.dtype, ignored, gradient)
    launch(logits_ptr=logits, labels_ptr=labels.contiguous(), losses_ptr=losses)
    return losses
