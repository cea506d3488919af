"""Text from a causal language model: prefill a prompt once, then one token at a time from a cache of fixed size.

Under sequence parallelism each rank holds its shard of the prompt. After the prefill every rank has the logits of
the next token and the whole cache, so any of them can go on alone: decoding exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lasp.generate.sampling import check_sampling, sample
from lasp.models import Cache, CausalLM, ModelConfig
from lasp.sequence.arguments import check_ids, check_kind, whole
from lasp.sequence.sequence_parallel import broadcast_errors, check_shard

if TYPE_CHECKING:
    from lasp.sequence import SequenceParallel

# Bounds the activations of a long prompt; large enough that a chunk keeps a GPU busy.
PREFILL_TOKENS = 16384


class Prefilled(NamedTuple):
    """A model that has read a prompt.

    Attributes:
        logits: [B, vocab] of the first new token.
        cache: after the prompt.
    """

    logits: Tensor
    cache: Cache


@torch.no_grad()
def prefill(
    model: CausalLM,
    prompt: Tensor,
    *,
    cache: Cache | None = None,
    sp: SequenceParallel | None = None,
    chunk_tokens: int = PREFILL_TOKENS,
) -> Prefilled:
    """Read a prompt.

    Args:
        prompt: int64 [B, T]; with `sp`, this rank's shard of it.
        cache: what the model has read before; with `sp` the same on every rank.
        sp: the ranks that share the prompt. The last token's logits are sent to all of them.
        chunk_tokens: read so many tokens at a time. With `sp` a shard is read at once.

    Raises:
        ValueError: the whole prompt is empty, or an argument does not fit.
    """
    with broadcast_errors(sp):
        _check_prompt(model, prompt, sp)
        whole("chunk_tokens", chunk_tokens, 1)
    if sp is not None:
        return _prefill_shards(model, prompt, cache, sp)
    if prompt.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token to continue from")
    logits = None
    for chunk in prompt.split(chunk_tokens, dim=1):
        out = model(chunk, cache=cache, output_cache=True, last_logits=1)
        logits, cache = out.logits, out.cache
    assert logits is not None and cache is not None
    return Prefilled(logits[:, -1], cache)


def _check_prompt(model: CausalLM, prompt: Tensor, sp: SequenceParallel | None) -> None:
    check_kind("model.config", getattr(model, "config", None), ModelConfig)
    check_ids("prompt", prompt, model.config.vocab_size, "[B, T]")
    check_shard(sp, prompt.shape[1])


def _prefill_shards(model: CausalLM, shard: Tensor, cache: Cache | None, sp: SequenceParallel) -> Prefilled:
    lengths = [shard.shape[1]] * sp.size if sp.lengths is None else list(sp.lengths)
    if sum(lengths) == 0:
        raise ValueError("the prompt is empty: give at least one token to continue from")
    last = max(rank for rank, length in enumerate(lengths) if length)
    out = model(shard, cache=cache, output_cache=True, last_logits=1, sp=sp)
    assert out.cache is not None
    # Ranks but the last give broadcast only the shape; a rank without tokens has no logits of its own.
    here = out.logits[:, -1] if sp.rank == last else out.logits.new_empty(out.logits.shape[0], out.logits.shape[2])
    return Prefilled(sp.broadcast(here.contiguous(), last), out.cache)


def decode(
    model: CausalLM,
    prefilled: Prefilled,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue from a prefilled prompt on this rank alone, yielding int64 [B] at a time.

    Time and memory of a token do not depend on how many came before it.
    """
    check_kind("model.config", getattr(model, "config", None), ModelConfig)
    check_kind("prefilled", prefilled, Prefilled)
    check_sampling(temperature, top_k, generator)
    return _decoded(model, prefilled, whole("max_new_tokens", max_new_tokens, 0), temperature, top_k, generator)


def _decoded(
    model: CausalLM,
    prefilled: Prefilled,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    logits, cache = prefilled
    for remaining in range(max_new_tokens, 0, -1):
        tokens = sample(logits, temperature=temperature, top_k=top_k, generator=generator)
        yield tokens
        if remaining > 1:
            with torch.no_grad():  # entered per step: a generator must not leave it on in its caller
                out = model(tokens[:, None], cache=cache, output_cache=True)
            logits, cache = out.logits[:, -1], out.cache


def stream(
    model: CausalLM,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    sp: SequenceParallel | None = None,
) -> Iterator[Tensor]:
    """Prefill, then yield one new token of each sequence at a time, int64 [B].

    With `sp`, every rank must call and consume; each decodes for itself and yields the same tokens. To decode on
    one rank only, call `prefill` on all and `decode` on that one.

    Args:
        prompt: int64 [B, T], T >= 1; with `sp`, this rank's shard.
        max_new_tokens: how many to generate.
        temperature: 0 takes the likeliest token; 1 draws from the model's own distribution.
        top_k: draw among the k likeliest tokens only.
        generator: on the model's device; the same seed gives the same tokens.
        sp: the ranks that share the prompt.

    Raises:
        ValueError: an argument means nothing, or sampling with `sp` lacks a generator.
    """
    with broadcast_errors(sp):
        _check_prompt(model, prompt, sp)
        check_sampling(temperature, top_k, generator)
        whole("max_new_tokens", max_new_tokens, 0)
    if sp is not None and sp.size > 1 and temperature > 0 and generator is None:
        raise ValueError(
            "sampling on several ranks needs a generator seeded alike on all of them: "
            "pass generator=torch.Generator(device).manual_seed(seed)"
        )
    prefilled = prefill(model, prompt, sp=sp)
    return decode(model, prefilled, max_new_tokens, temperature=temperature, top_k=top_k, generator=generator)


def generate(
    model: CausalLM,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    sp: SequenceParallel | None = None,
) -> Tensor:
    """The new tokens, int64 [B, max_new_tokens]. Arguments and errors are those of `stream`."""
    tokens = list(
        stream(model, prompt, max_new_tokens, temperature=temperature, top_k=top_k, generator=generator, sp=sp)
    )
    return torch.stack(tokens, dim=1) if tokens else prompt.new_empty(prompt.shape[0], 0)
