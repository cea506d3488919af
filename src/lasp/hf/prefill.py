"""Prefill: a prompt over ranks, after which each of them has the whole cache and generates as one process does.

Each rank's layers fill the cache that the model makes with what they have: keys and values of its tokens, the last rows
of its convolutions. Final states come from the operators, the same on every rank. What is local is gathered afterwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasp.hf import library
from lasp.hf.hooks import hooks_of
from lasp.hf.library import CACHES, cache_argument
from lasp.hf.shards import shard
from lasp.sequence import SequenceParallel


class PrefilledCache(NamedTuple):
    """A prompt's logits and cache, the same on every rank.

    Attributes:
        logits: of the token after it, [B, vocab].
        cache: transformers' own.
        keywords: the cache under the name by which this model's `generate` takes it, which versions of transformers
            change: "past_key_values", "cache_params" or "cache".
    """

    logits: Tensor
    cache: Any
    keywords: dict[str, Any]


@torch.no_grad()
def prefill(model: nn.Module, input_ids: Tensor, sp: SequenceParallel | None) -> PrefilledCache:
    """Run a parallelized model over a prompt, each rank over its part. Collective over the ranks.

    Then every rank goes on by transformers' own means, from a last token that is not yet in the cache:

        filled = lasp.hf.prefill(model, ids[:, :-1], sp)
        model.generate(ids[:, -1:], attention_mask=torch.ones_like(ids), **filled.keywords)

    Args:
        model: a model that generates, `lasp.hf.parallelize`d over `sp`.
        input_ids: integers [B, T], the same on every rank; at least one token a rank, without padding.
        sp: the ranks; their parts are `sp.lengths` or as equal as can be.

    Raises:
        ValueError: the model is not parallelized over these ranks, or the prompt cannot be split.
    """
    split = next((hook.split for hook in hooks_of(model)), None)
    if split is None or split.sp is not sp:
        raise ValueError("prefill runs a model that is parallelized over sp: lasp.hf.parallelize(model, sp) first")
    part = shard({"input_ids": input_ids}, sp)
    lengths = part["lasp_shard"].lengths
    split.is_prefill = True
    try:
        output = model(**part, use_cache=True, logits_to_keep=1)
    finally:
        split.is_prefill = False
    cache = next((output[name] for name in CACHES if output.get(name) is not None), None)
    if cache is None:
        raise ValueError(f"{type(model).__name__} gives no cache: prefill takes a model that generates")
    kind = library.load("modeling_utils").PreTrainedModel
    inner = next(module for module in model.modules() if isinstance(module, kind))
    keywords = {cache_argument(inner) or "past_key_values": cache}
    logits = output.logits[:, -1].contiguous()
    if sp is None or sp.size == 1:
        return PrefilledCache(logits, cache, keywords)
    for layer in cache.layers:
        _gather_layer(layer, sp, lengths)
    return PrefilledCache(sp.broadcast(logits, sp.size - 1), cache, keywords)


def _gather_layer(layer: Any, sp: SequenceParallel, lengths: tuple[int, ...]) -> None:
    """Make what a layer of the cache has of this rank's tokens what it has of all."""
    if getattr(layer, "keys", None) is not None:
        window = getattr(layer, "sliding_window", None)
        # A layer with a window keeps that many tokens but one, of each rank and in the end.
        kept = [length if window is None else min(length, window - 1) for length in lengths]
        for name in ("keys", "values"):
            whole = torch.cat(_parts(getattr(layer, name), sp, kept, dim=-2), -2)
            setattr(layer, name, whole if window is None else whole[..., -window + 1 :, :])
        if window is not None:
            layer.cumulative_length = sum(lengths)
    for rows in getattr(layer, "conv_states", {}).values():
        if rows is not None:
            width = rows.shape[-1]
            kept = [min(length, width) for length in lengths]
            whole = torch.cat(_parts(rows[..., width - kept[sp.rank] :], sp, kept, dim=-1), -1)[..., -width:]
            rows.copy_(nn.functional.pad(whole, (width - whole.shape[-1], 0)))


def _parts(own: Tensor, sp: SequenceParallel, counts: list[int], *, dim: int) -> list[Tensor]:
    """Each rank's rows, of which there are so many."""
    parts = []
    for rank, count in enumerate(counts):
        shape = list(own.shape)
        shape[dim] = count
        part = own.contiguous() if rank == sp.rank else own.new_empty(shape)
        parts.append(sp.broadcast(part, rank))
    return parts
