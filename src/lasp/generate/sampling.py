"""The choice of one token from its logits."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from lasp.sequence.arguments import check_floats, check_generator, number, whole


def check_sampling(temperature: float, top_k: int | None, generator: torch.Generator | None) -> None:
    """Raise ValueError for an argument that means nothing."""
    check_generator(generator)
    number("temperature", temperature, ">= 0 (0 takes the likeliest token)", lambda t: 0 <= t < inf)
    if top_k is not None:
        whole("top_k", top_k, 1)


def sample(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one token for each row of logits [B, vocab]; int64 [B].

    Args:
        temperature: 0 takes the likeliest token; 1 draws from the model's own distribution.
        top_k: draw among the k likeliest tokens only.
        generator: on the logits' device; torch's default generator if None.
    """
    check_floats("logits", logits, "[B, vocab]", 2)
    if logits.shape[1] == 0:
        raise ValueError("logits must be [B, vocab] of at least one token id, got none")
    check_sampling(temperature, top_k, generator)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is None or top_k >= logits.shape[-1]:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    likeliest, tokens = logits.topk(top_k, dim=-1)
    drawn = torch.multinomial(likeliest.softmax(-1), 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)
