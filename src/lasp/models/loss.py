"""Cross entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100

# fp32 logits alive at once, in elements: 64 MiB, and as much again for their gradient.
_CHUNK_ELEMENTS = 1 << 24


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[label], in nats.

    Logits are computed a chunk of tokens at a time and again in the backward pass, so memory is that of one chunk.

    Args:
        hidden: [N, D].
        weight: [vocab, D].
        labels: int64 [N]; -100 is ignored.
        chunk_tokens: tokens per chunk; by default as many as keep the logits at 64 MiB.

    Returns:
        A scalar in fp32 (fp64 for fp64 hidden), connected to the graph also where there is no token.
    """
    if chunk_tokens is None:
        chunk_tokens = max(128, _CHUNK_ELEMENTS // weight.shape[0])
    total = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for first in range(0, max(1, hidden.shape[0]), chunk_tokens):
        chunk = slice(first, first + chunk_tokens)
        loss = checkpoint(
            _chunk_sum, hidden[chunk], weight, labels[chunk], use_reentrant=False, preserve_rng_state=False
        )
        total = total + loss
    return total


def _chunk_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
