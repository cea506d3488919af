"""Carries queries, keys, values and outputs across ranks, each with the exchange that takes their gradients back.

LASP-2H (arXiv 2502.07563) gathers keys and values. Where queries see a window, the rows before a rank's own are enough.
Ulysses (arXiv 2309.14509) trades tokens for heads: in between, each rank has all tokens of some heads. Sums of
gradients are taken in rank order, in fp32 for 16-bit inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.distributed.call import Call
from lasp.exchange.start import SequenceCall, adjoint_of, save_after
from lasp.recurrence.derivatives import first_derivatives

Shape = tuple[int, ...]


def _all_to_all(
    messages: Call, parts: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Shape]]
) -> list[list[Tensor]]:
    """The tensors `parts[r]` go to rank r as one message; what comes from rank r has `shapes[r]`."""
    flat = [torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in parts]
    sizes = [[math.prod(shape) for shape in wanted] for wanted in shapes]
    received = messages.all_to_all(flat, [sum(size) for size in sizes]).wait()
    return [
        [piece.view(shape) for piece, shape in zip(message.split(size), wanted, strict=True)]
        for message, size, wanted in zip(received, sizes, shapes, strict=True)
    ]


def _sum(parts: list[Tensor]) -> Tensor:
    """Sum in order, and in fp32 where the parts have 16 bits."""
    total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32))
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


def gather(
    k: Tensor, v: Tensor, call: SequenceCall | None, starts: tuple[int, ...], *, all_ranks: bool
) -> tuple[Tensor, Tensor]:
    """Keys and values of all ranks, or of those up to this one: [B, S, H_kv, D] and [B, S, H_kv, D_v].

    starts: first token of every rank, and the total. all_ranks: also of later ranks, the same on every rank.
    """
    if call is None or starts[-1] == 0:
        return k, v
    gathered: tuple[Tensor, Tensor] = _Gather.apply(call, starts, all_ranks, k, v)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: SequenceCall, starts: tuple[int, ...], all_ranks: bool, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.starts, ctx.all_ranks = call, starts, all_ranks
        keys, values = gathered(k, v, call.messages, starts, all_ranks=all_ranks)
        save_after(ctx, keys)
        return keys, values

    @staticmethod
    @first_derivatives("softmax_attention over ranks", linear=True)
    def backward(ctx: Any, d_k: Tensor, d_v: Tensor) -> tuple[Any, ...]:
        messages = adjoint_of(ctx, "backward of keys and values").messages
        found = gathered_gradients(d_k, d_v, messages, ctx.starts, all_ranks=ctx.all_ranks)
        return None, None, None, *found


def gathered(
    k: Tensor, v: Tensor, messages: Call, starts: tuple[int, ...], *, all_ranks: bool
) -> tuple[Tensor, Tensor]:
    """Give what `gather` does, which nothing differentiates."""
    lengths = [end - start for start, end in pairwise(starts)]
    own = torch.cat((k.reshape(-1), v.reshape(-1)))
    row_k, row_v = (t.shape[0] * t.shape[2] * t.shape[3] for t in (k, v))
    # Collectives want equal parts: shorter shards are filled up.
    message = own.new_zeros(max(lengths) * (row_k + row_v))
    message[: own.numel()] = own
    parts = messages.all_gather(message).wait()
    ranks = range(messages.size if all_ranks else messages.rank + 1)
    keys = [_view(parts[r, : lengths[r] * row_k], k, lengths[r]) for r in ranks]
    values = [_view(parts[r, lengths[r] * row_k : lengths[r] * (row_k + row_v)], v, lengths[r]) for r in ranks]
    return torch.cat(keys, 1), torch.cat(values, 1)


def gathered_gradients(
    d_k: Tensor, d_v: Tensor, messages: Call, starts: tuple[int, ...], *, all_ranks: bool
) -> tuple[Tensor, Tensor]:
    """Send each rank's share of every gradient to the tokens' rank; no rank sees keys of later ones."""
    tokens = starts[messages.rank + 1] - starts[messages.rank]
    own = [(t.shape[0], tokens, *t.shape[2:]) for t in (d_k, d_v)]
    parts, shapes = [], []
    for rank, (start, end) in enumerate(pairwise(starts)):
        parts.append((d_k[:, start:end], d_v[:, start:end]))
        shapes.append(own if all_ranks or rank >= messages.rank else [(0,), (0,)])
    received = _all_to_all(messages, parts, shapes)
    users = received if all_ranks else received[messages.rank :]
    return _sum([part[0] for part in users]), _sum([part[1] for part in users])


def gather_window(
    k: Tensor, v: Tensor, call: SequenceCall | None, starts: tuple[int, ...], window: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of this rank, after those of the `window - 1` tokens before it, or of all there are.

    They may lie on several ranks. What a rank sends does not grow with the sequence.
    """
    if call is None or starts[-1] == 0:
        return k, v
    gathered: tuple[Tensor, Tensor] = _GatherWindow.apply(call, starts, window, k, v)
    return gathered


def first_of_window(starts: tuple[int, ...], rank: int, window: int) -> int:
    """The first token whose key a rank's queries may see."""
    return max(0, starts[rank] - window + 1) if starts[rank + 1] > starts[rank] else starts[rank]


def _reach(starts: tuple[int, ...], window: int, source: int, reader: int) -> tuple[int, int]:
    """Tokens of rank `source` that are before rank `reader`'s and within its windows: first, last + 1, from 0 there."""
    first = max(starts[source], first_of_window(starts, reader, window))
    last = min(starts[source + 1], starts[reader])
    return (first - starts[source], last - starts[source]) if source < reader and first < last else (0, 0)


class _GatherWindow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: SequenceCall, starts: tuple[int, ...], window: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.starts, ctx.window = call, starts, window
        messages = call.messages
        ranks = range(messages.size)
        sent = [slice(*_reach(starts, window, messages.rank, reader)) for reader in ranks]
        received = _all_to_all(
            messages, [(k[:, part], v[:, part]) for part in sent], _window_shapes(ctx, messages.rank, k, v)
        )
        keys, values = (torch.cat([*(part[index] for part in received), t], 1) for index, t in enumerate((k, v)))
        save_after(ctx, keys)
        return keys, values

    @staticmethod
    @first_derivatives("softmax_attention over ranks", linear=True)
    def backward(ctx: Any, d_k: Tensor, d_v: Tensor) -> tuple[Any, ...]:
        """Each rank's gradients of keys that it has read go back to their rank."""
        messages, starts, window = adjoint_of(ctx, "backward of a window's keys").messages, ctx.starts, ctx.window
        rank, first = messages.rank, first_of_window(starts, messages.rank, window)
        own = starts[rank] - first
        parts, shapes = [], []
        for other in range(messages.size):
            here, there = _reach(starts, window, other, rank)
            begin = starts[other] + here - first if there > here else 0
            parts.append(tuple(t[:, begin : begin + there - here] for t in (d_k, d_v)))
            read = slice(*_reach(starts, window, rank, other))
            shapes.append([(t.shape[0], read.stop - read.start, *t.shape[2:]) for t in (d_k, d_v)])
        received = _all_to_all(messages, parts, shapes)
        gradients = []
        for index, gradient in enumerate((d_k, d_v)):
            total = gradient[:, own:].to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
            for other, part in enumerate(received):
                total[:, slice(*_reach(starts, window, rank, other))] += part[index]
            gradients.append(total.to(gradient.dtype))
        return None, None, None, *gradients


def _window_shapes(ctx: Any, rank: int, k: Tensor, v: Tensor) -> list[list[Shape]]:
    reached = [_reach(ctx.starts, ctx.window, source, rank) for source in range(len(ctx.starts) - 1)]
    return [[(t.shape[0], last - first, *t.shape[2:]) for t in (k, v)] for first, last in reached]


def _view(flat: Tensor, like: Tensor, tokens: int) -> Tensor:
    return flat.view(like.shape[0], tokens, *like.shape[2:])


class Heads(NamedTuple):
    """Heads that each rank works on.

    Attributes:
        queries: (first, last + 1) query heads of every rank.
        keys: (first, last + 1) key heads that those use; ranks may share some.
    """

    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]


def heads_of(size: int, heads: int, key_heads: int) -> Heads:
    """Equal shares of `heads`, a multiple of `size`, and the key heads that they use."""
    share, group = heads // size, heads // key_heads
    queries = tuple((rank * share, (rank + 1) * share) for rank in range(size))
    return Heads(queries, tuple((first // group, (last - 1) // group + 1) for first, last in queries))


def key_heads(tensor: Tensor, queries: tuple[int, int], group: int) -> Tensor:
    """The key heads of a range of query heads, `group` to each, spread out where not every one has equally many."""
    first = queries[0] // group
    wanted = [head // group - first for head in range(*queries)]
    count = tensor.shape[2]
    each = len(wanted) // count
    even = len(wanted) == each * count and wanted == [index // each for index in range(len(wanted))]
    return tensor if even else torch.stack([tensor[:, :, head] for head in wanted], 2)


def to_heads(
    tensors: Sequence[Tensor], ranges: Sequence[Sequence[tuple[int, int]]], call: SequenceCall, starts: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """[B, T, all heads, D] -> [B, S, this rank's heads, D], for each tensor with the heads of every rank."""
    moved: tuple[Tensor, ...] = _ToHeads.apply(call, starts, tuple(ranges), *tensors)
    return moved


def to_tokens(o: Tensor, of: Sequence[tuple[int, int]], call: SequenceCall, starts: tuple[int, ...]) -> Tensor:
    """o [B, S, h, D_v], all tokens of this rank's heads -> [B, T, H, D_v], all heads of this rank's tokens."""
    tokens: Tensor = _ToTokens.apply(call, starts, of, o)
    return tokens


def tokens_to_heads(messages: Call, starts: tuple[int, ...], ranges: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
    """[B, T, all heads, D] -> [B, S, own heads, D] for each tensor with its ranges of heads."""
    ranks = range(messages.size)
    parts = [[t[:, :, slice(*of[rank])] for t, of in zip(tensors, ranges, strict=True)] for rank in ranks]
    own = [of[messages.rank][1] - of[messages.rank][0] for of in ranges]
    shapes = [
        [(t.shape[0], end - start, count, t.shape[3]) for t, count in zip(tensors, own, strict=True)]
        for start, end in pairwise(starts)
    ]
    received = _all_to_all(messages, parts, shapes)
    return tuple(torch.cat(pieces, 1) for pieces in zip(*received, strict=True))


def heads_to_tokens(
    messages: Call, starts: tuple[int, ...], ranges: Sequence[Any], tensors: Sequence[Tensor], heads: Sequence[int]
) -> Any:
    """[B, S, own heads, D] -> [B, T, all heads, D]; where several ranks have the same head, their sum."""
    parts = [[t[:, start:end] for t in tensors] for start, end in pairwise(starts)]
    tokens = starts[messages.rank + 1] - starts[messages.rank]
    shapes = [
        [(t.shape[0], tokens, of[rank][1] - of[rank][0], t.shape[3]) for t, of in zip(tensors, ranges, strict=True)]
        for rank in range(messages.size)
    ]
    received = _all_to_all(messages, parts, shapes)
    results = []
    for index, (of, count) in enumerate(zip(ranges, heads, strict=True)):
        if all(left[1] == right[0] for left, right in pairwise(of)):
            results.append(torch.cat([message[index] for message in received], 2))
            continue
        columns = []
        for head in range(count):
            holders = [rank for rank, (first, last) in enumerate(of) if first <= head < last]
            columns.append(_sum([received[rank][index][:, :, head - of[rank][0]] for rank in holders]))
        results.append(torch.stack(columns, 2))
    return tuple(results)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: SequenceCall, starts: tuple[int, ...], ranges: Any, *tensors: Tensor) -> Any:
        ctx.call, ctx.starts, ctx.ranges, ctx.heads = call, starts, ranges, [t.shape[2] for t in tensors]
        moved = tokens_to_heads(call.messages, starts, ranges, tensors)
        save_after(ctx, moved[0])
        return moved

    @staticmethod
    @first_derivatives("softmax_attention over ranks", linear=True)
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        messages = adjoint_of(ctx, "backward of tokens to heads").messages
        return None, None, None, *heads_to_tokens(messages, ctx.starts, ctx.ranges, gradients, ctx.heads)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: SequenceCall, starts: tuple[int, ...], of: Any, o: Tensor) -> Tensor:
        ctx.call, ctx.starts, ctx.of = call, starts, of
        (tokens,) = heads_to_tokens(call.messages, starts, [of], [o], [of[-1][1]])
        save_after(ctx, tokens)
        return tokens

    @staticmethod
    @first_derivatives("softmax_attention over ranks", linear=True)
    def backward(ctx: Any, d_o: Tensor) -> tuple[Any, ...]:
        messages = adjoint_of(ctx, "backward of heads to tokens").messages
        return None, None, None, *tokens_to_heads(messages, ctx.starts, [ctx.of], [d_o])


def replicated(tensor: Tensor, call: SequenceCall | None) -> Tensor:
    """`tensor`, the same on every rank; its gradient is whole on the first rank and zero on the others."""
    if call is None:
        return tensor
    same: Tensor = _Replicated.apply(call, tensor)
    return same


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: SequenceCall, tensor: Tensor) -> Tensor:
        ctx.call = call
        save_after(ctx, tensor)
        return tensor.view_as(tensor)

    @staticmethod
    @first_derivatives("softmax_attention over ranks", linear=True)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        call = adjoint_of(ctx, "backward of the initial state")
        total = call.sum(gradient)
        return None, total if call.rank == 0 else torch.zeros_like(total)
