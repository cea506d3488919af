"""The choice of one token from its logits."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from lasp.sequence.arguments import number, whole


def check_sampling(temperature: float, top_k: int | None) -> None:
    """Raise ValueError for a temperature or top_k that means nothing."""
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
    check_sampling(temperature, top_k)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is None or top_k >= logits.shape[-1]:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    likeliest, tokens = logits.topk(top_k, dim=-1)
    drawn = torch.multinomial(likeliest.softmax(-1), 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)
