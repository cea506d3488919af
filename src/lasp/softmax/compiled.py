"""Softmax attention in compiled graphs: the exchanges, and attention within documents, as operators of PyTorch's.

They know the ranks by a number, and packed documents by a tensor, best on the host, whose numbers they read when they
run. Queries and keys here are the last tokens of the keys that there are, each of which sees those up to its own.
"""

# No postponed annotations: the operators' schemas are read from them.
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lasp.distributed.call import Call
from lasp.exchange.start import ranks_of
from lasp.sequence import SequenceParallel
from lasp.sequence.arguments import as_operand
from lasp.sequence.sequence_parallel import broadcast_errors
from lasp.sequence.shards import document_bounds, document_digest, shard_starts
from lasp.softmax.exchange import gathered, gathered_gradients, heads_of, heads_to_tokens, key_heads, tokens_to_heads
from lasp.softmax.local import sdpa_block
from lasp.softmax.scores import ScoreOptions
from lasp.softmax.within import Spans, attend_within, attend_within_gradients


def attend_in_graph(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | Sequence[int] | None,
    sp: SequenceParallel | None,
    method: str,
    scale: float,
) -> Tensor:
    """Attend causally: q [B, T, H, D], k [B, T, H_kv, D], v [B, T, H_kv, D_v] -> [B, T, H, D_v]."""
    tokens, heads, num_key_heads = q.shape[1], q.shape[2], k.shape[2]
    cu_seqlens = as_operand(cu_seqlens)
    if sp is None or sp.size == 1:
        return _all_tokens(q, k, v, cu_seqlens, scale)
    total = sp.total(tokens)
    if method == "all_gather":
        first = sp.offset(tokens)
        k, v = gather_keys(k, v, cu_seqlens, first + tokens, sp.key)
        return within_documents(q, k, v, cu_seqlens, first, total, scale)[0]
    of = heads_of(sp.size, heads, num_key_heads)
    own = [ranges[sp.rank][1] - ranges[sp.rank][0] for ranges in (of.queries, of.keys, of.keys)]
    q, k, v = trade_for_heads([q, k, v], cu_seqlens, [heads, num_key_heads, num_key_heads], own, total, sp.key)
    k, v = (key_heads(t, of.queries[sp.rank], heads // num_key_heads) for t in (k, v))
    o = _all_tokens(q, k, v, cu_seqlens, scale)
    return trade_for_tokens([o], cu_seqlens, [heads], tokens, sp.key)[0]


def _all_tokens(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float) -> Tensor:
    if cu_seqlens is None:
        return sdpa_block(q, k, v, None, ScoreOptions(True, scale))
    return within_documents(q, k, v, cu_seqlens, 0, q.shape[1], scale)[0]


def _messages(key: int, cu_seqlens: Tensor | None, tokens: int, what: str, like: list[Tensor]) -> tuple[Call, Any]:
    """Tell the other ranks what is exchanged. What is sent is part of it; and where each rank's tokens begin."""
    ranks: SequenceParallel = ranks_of(key)  # type: ignore[assignment]
    with broadcast_errors(ranks):
        starts = shard_starts(ranks, tokens)
        bounds = document_bounds(cu_seqlens, starts[-1], like[0].shape[0])
    sizes = tuple((t.shape[0], *t.shape[2:]) for t in like)
    fields = {"exchange of": what, "batch, heads and channels": sizes, "dtype": str(like[0].dtype)}
    call = ranks.call(
        "compiled softmax_attention", (what, sizes, like[0].dtype), lambda: fields, document_digest(bounds)
    )
    assert call is not None
    return call.messages, starts


@torch.library.custom_op("lasp::gather_keys", mutates_args=())
def gather_keys(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, total: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all ranks up to this one, [B, total, H_kv, ..]."""
    messages, starts = _messages(ranks, cu_seqlens, k.shape[1], "keys and values", [k, v])
    return gathered(k, v, messages, starts, all_ranks=False)


@gather_keys.register_fake
def _(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, total: int, ranks: int) -> tuple[Tensor, Tensor]:
    return tuple(t.new_empty(t.shape[0], total, *t.shape[2:]) for t in (k, v))  # type: ignore[return-value]


@torch.library.custom_op("lasp::gather_keys_gradients", mutates_args=())
def gather_keys_gradients(
    d_k: Tensor, d_v: Tensor, cu_seqlens: Tensor | None, tokens: int, ranks: int
) -> tuple[Tensor, Tensor]:
    """The gradients of this rank's keys and values, which later ranks have read."""
    messages, starts = _messages(ranks, cu_seqlens, tokens, "gradients of keys and values", [d_k, d_v])
    found = gathered_gradients(d_k, d_v, messages, starts, all_ranks=False)
    return tuple(t.clone() for t in found)  # type: ignore[return-value]  # they may share a message's memory


@gather_keys_gradients.register_fake
def _(d_k: Tensor, d_v: Tensor, cu_seqlens: Tensor | None, tokens: int, ranks: int) -> tuple[Tensor, Tensor]:
    return tuple(t.new_empty(t.shape[0], tokens, *t.shape[2:]) for t in (d_k, d_v))  # type: ignore[return-value]


def _keep_gather(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    k, _, cu_seqlens, _, ctx.ranks = inputs
    ctx.tokens = k.shape[1]
    ctx.save_for_backward(cu_seqlens)


def _gather_backward(ctx: Any, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    return *gather_keys_gradients(d_k, d_v, cu_seqlens, ctx.tokens, ctx.ranks), None, None, None


gather_keys.register_autograd(_gather_backward, setup_context=_keep_gather)


@torch.library.custom_op("lasp::trade_for_heads", mutates_args=())
def trade_for_heads(
    tensors: list[Tensor], cu_seqlens: Tensor | None, heads: list[int], own: list[int], total: int, ranks: int
) -> list[Tensor]:
    """[B, T, heads[n], D] -> [B, total, own[n], D]: all tokens of some heads. The first are queries, or their kind."""
    messages, starts = _messages(ranks, cu_seqlens, tensors[0].shape[1], "tokens for heads", tensors)
    return list(tokens_to_heads(messages, starts, _ranges(messages, heads), tensors))


@trade_for_heads.register_fake
def _(
    tensors: list[Tensor], cu_seqlens: Tensor | None, heads: list[int], own: list[int], total: int, ranks: int
) -> list[Tensor]:
    return [t.new_empty(t.shape[0], total, count, t.shape[3]) for t, count in zip(tensors, own, strict=True)]


@torch.library.custom_op("lasp::trade_for_tokens", mutates_args=())
def trade_for_tokens(
    tensors: list[Tensor], cu_seqlens: Tensor | None, heads: list[int], tokens: int, ranks: int
) -> list[Tensor]:
    """[B, S, own heads, D] -> [B, tokens, heads[n], D]: the adjoint. Where several ranks have a head, their sum."""
    messages, starts = _messages(ranks, cu_seqlens, tokens, "heads for tokens", tensors)
    return list(heads_to_tokens(messages, starts, _ranges(messages, heads), tensors, heads))


@trade_for_tokens.register_fake
def _(tensors: list[Tensor], cu_seqlens: Tensor | None, heads: list[int], tokens: int, ranks: int) -> list[Tensor]:
    return [t.new_empty(t.shape[0], tokens, count, t.shape[3]) for t, count in zip(tensors, heads, strict=True)]


def _ranges(messages: Call, heads: list[int]) -> list[Any]:
    """Heads of every rank for each tensor, of which the first is one of queries."""
    found = [heads_of(messages.size, heads[0], count) for count in heads]
    return [found[0].queries, *(of.keys for of in found[1:])]


def _keep_trade(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, cu_seqlens, ctx.heads, *_, ctx.ranks = inputs
    ctx.tokens, ctx.own = tensors[0].shape[1], [t.shape[2] for t in tensors]
    ctx.save_for_backward(cu_seqlens)


def _trade_for_heads_backward(ctx: Any, d_tensors: list[Tensor]) -> tuple[Any, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    return trade_for_tokens(d_tensors, cu_seqlens, ctx.heads, ctx.tokens, ctx.ranks), None, None, None, None, None


def _trade_for_tokens_backward(ctx: Any, d_tensors: list[Tensor]) -> tuple[Any, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    found = trade_for_heads(d_tensors, cu_seqlens, ctx.heads, ctx.own, ctx.tokens, ctx.ranks)
    return found, None, None, None, None


trade_for_heads.register_autograd(_trade_for_heads_backward, setup_context=_keep_trade)
trade_for_tokens.register_autograd(_trade_for_tokens_backward, setup_context=_keep_trade)


def _spans(cu_seqlens: Tensor | None, q: Tensor, first: int, total: int) -> Spans:
    """Find where the queries and keys of each document here are."""
    spans = []
    for start, end in pairwise(document_bounds(cu_seqlens, total, q.shape[0])):
        here, stop = max(start, first), min(end, first + q.shape[1])
        if here < stop:
            spans.append((here - first, stop - first, start, stop))
    return tuple(spans)


@torch.library.custom_op("lasp::within_documents", mutates_args=())
def within_documents(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, first: int, total: int, scale: float
) -> list[Tensor]:
    """o [B, T, H, D_v] of the queries from token `first` on of `total`, of which the last sees the last key; and the
    logarithms of their sums, [H, B T]."""
    return list(attend_within(q, k, v, _spans(cu_seqlens, q, first, total), scale))


@within_documents.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, first: int, total: int, scale: float) -> list[Tensor]:
    sums = q.new_empty(q.shape[2], q.shape[0] * q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
    return [q.new_empty(*q.shape[:3], v.shape[3]), sums]


@torch.library.custom_op("lasp::within_documents_gradients", mutates_args=())
def within_documents_gradients(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    sums: Tensor,
    cu_seqlens: Tensor | None,
    first: int,
    total: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    return attend_within_gradients(d_o, q, k, v, o, sums, _spans(cu_seqlens, q, first, total), scale)


@within_documents_gradients.register_fake
def _(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    sums: Tensor,
    cu_seqlens: Tensor | None,
    first: int,
    total: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v))  # type: ignore[return-value]


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.first, ctx.total, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _attention_backward(ctx: Any, d_output: list[Tensor]) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, o, sums = ctx.saved_tensors
    found = within_documents_gradients(d_output[0], q, k, v, o, sums, cu_seqlens, ctx.first, ctx.total, ctx.scale)
    return *found, None, None, None, None


within_documents.register_autograd(_attention_backward, setup_context=_keep_attention)
