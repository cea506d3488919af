"""The public function: softmax attention whose sequence lies on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.exchange.start import SequenceCall
from lasp.recurrence.untraced import untraced
from lasp.sequence import SequenceParallel
from lasp.sequence.arguments import check_flags, check_floats, check_tensor, number, whole
from lasp.sequence.sequence_parallel import broadcast_errors, check_shard
from lasp.sequence.shards import document_bounds, document_digest, shard_starts
from lasp.softmax.blocks import blocks_of, keys_of
from lasp.softmax.compiled import attend_in_graph
from lasp.softmax.exchange import (
    first_of_window,
    gather,
    gather_window,
    heads_of,
    key_heads,
    replicated,
    to_heads,
    to_tokens,
)
from lasp.softmax.local import attend
from lasp.softmax.scores import ScoreOptions
from lasp.softmax.within import has_operators

METHODS = ("auto", "all_gather", "ulysses")
BACKENDS = ("auto", "torch", "reference")


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    initial_cu_seqlens: Tensor | Sequence[int] | None = None,
    sp: SequenceParallel | None = None,
    method: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention: o_t = sum_s softmax_s(scale q_t k_s) v_s over the tokens s that t sees.

    With `sp`, T is this rank's part of a longer sequence, and the result is as if one device had computed all of it.
    Unlike a recurrence's, the state here grows: it is the keys and values of all tokens.

    Args:
        q: [B, T, H, D], fp64, fp32, bf16 or fp16.
        k: [B, T, H_kv, D] and v [B, T, H_kv, D_v] of the same dtype; H a multiple of H_kv. Query head h uses key
            head h // (H // H_kv).
        causal: False to let every token see all tokens of its document.
        scale: factor of the scores, D ** -0.5 by default.
        window: tokens that each token sees, itself and those before it; None for all. With "all_gather" a rank gets the
            window - 1 tokens before its own, so that neither work nor messages grow with the sequence. Where there are
            states, it gets all.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: [H], the same on every rank: a score for each head that takes part in the softmax, and has no value. Each
            rank's gradient is a share; their sum is the whole. With a soft cap or sinks, PyTorch's fused kernels do not
            run, and scores are computed a tile at a time.
        initial_state: [B, P, H_kv, D + D_v] of q's dtype, keys beside values of the P tokens before the first of the
            global sequence, the same on every rank of `sp`. Its gradient is whole on the group's first rank and zero
            on the others.
        output_final_state: also return the keys and values of all tokens of the global sequence, after
            initial_state's, in the same form, on every rank. The gradients that the ranks give for it are summed.
        cu_seqlens: integers [N + 1], the same on every rank: where the packed documents of the whole sequence (of
            all ranks together) start, and its length; B must be 1. No document sees another. The states are packed
            like the tokens: in the final state, each document's rows of initial_state come before its tokens.
        initial_cu_seqlens: integers [N + 1], the same on every rank: where each document's rows start in
            initial_state, and P. Those of the final state are cu_seqlens + initial_cu_seqlens. Needed where
            cu_seqlens and initial_state are both given.
        sp: the ranks that share the sequence. All of them must call, with the same arguments but for the tokens.
        method: "all_gather": each rank gets the keys and values of all (LASP-2H, arXiv 2502.07563); any heads.
            "ulysses": each rank computes all tokens of some heads (arXiv 2309.14509); H must be a multiple of the
            number of ranks. "auto": see `chosen_method`. docs/guide/hybrids.md says what each costs.
        backend: "auto" or "torch" (PyTorch's kernels) or "reference" (query by query, slow).

    Returns:
        o [B, T, H, D_v], and the final state or None.

    Raises:
        ValueError: an argument does not fit.
        ExchangeError: the ranks of `sp` disagree, or one does not answer in time.
    """
    with broadcast_errors(sp):
        _check_inputs(q, k, v)
        check_flags(causal=causal, output_final_state=output_final_state)
        for name, value, known in (("method", method, METHODS), ("backend", backend, BACKENDS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        check_shard(sp, q.shape[1])
        _check_heads(q.shape[2], method, sp)
        window = _checked_window(window, causal=causal)
        if method == "auto":
            method = chosen_method(q.shape[2], 1 if sp is None else sp.size, window, causal=causal)
        softcap = None if softcap is None else number("softcap", softcap, "a number > 0", lambda cap: 0 < cap < inf)
        _check_sinks(sinks, q)
        _check_state(initial_state, k, v)
        scale = q.shape[3] ** -0.5 if scale is None else number("scale", scale)
    scores = ScoreOptions(causal, scale, softcap)
    over_ranks = sp is not None and sp.size > 1
    run = _attended
    if torch.compiler.is_compiling():
        plain = causal and window is None and softcap is None and sinks is None and scale > 0 and backend != "reference"
        stateless = initial_state is None and initial_cu_seqlens is None and not output_final_state
        if plain and stateless and has_operators(q.device, q.dtype, max(q.shape[3], v.shape[3])):
            with torch.autocast(q.device.type, enabled=False):  # the arguments' dtype is the one asked for
                return attend_in_graph(q, k, v, cu_seqlens, sp, method, scale), None
        run = _outside_of_graphs if over_ranks else run
    ways = _Ways(scores, window, method, backend, output_final_state)
    return run(q, k, v, sinks, initial_state, cu_seqlens, initial_cu_seqlens, sp, ways)


def chosen_method(heads: int, ranks: int, window: int | None = None, *, causal: bool = True) -> str:
    """Return what "auto" is for so many query heads: "ulysses", by which ranks have equal work, where they divide the
    heads; else, with windows and where every token sees all, whose work is equal by either, "all_gather"."""
    return "ulysses" if ranks > 1 and heads % ranks == 0 and causal and window is None else "all_gather"


class _Ways(NamedTuple):
    """The checked arguments that are the same for any sequence; see `softmax_attention`."""

    scores: ScoreOptions
    window: int | None
    method: str
    backend: str
    want_final: bool


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | Sequence[int] | None,
    initial_cu_seqlens: Tensor | Sequence[int] | None,
    sp: SequenceParallel | None,
    ways: _Ways,
) -> tuple[Tensor, Tensor | None]:
    with broadcast_errors(sp):
        starts = shard_starts(sp, q.shape[1])
        bounds = document_bounds(cu_seqlens, starts[-1], q.shape[0])
        before = _rows_before(initial_state, initial_cu_seqlens, None if cu_seqlens is None else len(bounds) - 1)
    options = (*ways.scores, *ways[1:])
    call = _called(sp, q, k, v, sinks, bounds, before, initial_state, options)
    with torch.autocast(q.device.type, enabled=False):  # the arguments' dtype is the one asked for
        return _across_ranks(q, k, v, sinks, initial_state, call, _Problem(*ways, starts, bounds, before))


_outside_of_graphs = untraced(_attended, "softmax_attention over several ranks with a window, a cap, sinks or states")


class _Problem(NamedTuple):
    """The ways, and where shards, documents and their rows of the initial state begin; see `shard_starts`,
    `document_bounds` and `blocks_of`."""

    scores: ScoreOptions
    window: int | None
    method: str
    backend: str
    want_final: bool
    starts: tuple[int, ...]
    bounds: tuple[int, ...]
    before: tuple[int, ...]


def _across_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    initial_state: Tensor | None,
    call: SequenceCall | None,
    problem: _Problem,
) -> tuple[Tensor, Tensor | None]:
    scores, window, method, backend, output_final_state, starts, bounds, before = problem
    rank = 0 if call is None else call.rank
    state = None if initial_state is None else replicated(initial_state, call)
    if method == "ulysses" and call is not None and starts[-1] > 0:
        of = heads_of(call.messages.size, q.shape[2], k.shape[2])
        blocks = blocks_of(bounds, before, 0, starts[-1], scores.causal, window)
        sinks = None if sinks is None else sinks[slice(*of.queries[rank])]
        if output_final_state:
            # The state takes all heads to all ranks; and o must depend on that exchange, because its backward pass
            # needs every rank, also those that make no use of the state.
            k_all, v_all = _after(state, *gather(k, v, call, starts, all_ranks=True), problem)
            final_state = torch.cat((k_all, v_all), -1)
            (q_all,) = to_heads((q,), (of.queries,), call, starts)
            k_all, v_all = (t[:, :, slice(*of.keys[rank])] for t in (k_all, v_all))
        else:
            final_state = None
            q_all, k_all, v_all = to_heads((q, k, v), (of.queries, of.keys, of.keys), call, starts)
            k_all, v_all = _after(None if state is None else state[:, :, slice(*of.keys[rank])], k_all, v_all, problem)
        k_all, v_all = (key_heads(t, of.queries[rank], q.shape[2] // k.shape[2]) for t in (k_all, v_all))
        o = attend(q_all, k_all, v_all, sinks, blocks, scores, backend=backend)
        return to_tokens(o, of.queries, call, starts), final_state
    if window is not None and state is None and not output_final_state:
        k_all, v_all = gather_window(k, v, call, starts, window)
        first = first_of_window(starts, rank, window)
        blocks = blocks_of(bounds, before, starts[rank], starts[rank + 1], True, window, first)
        return attend(q, k_all, v_all, sinks, blocks, scores, backend=backend), None
    k_all, v_all = gather(k, v, call, starts, all_ranks=output_final_state or not scores.causal)
    k_all, v_all = _after(state, k_all, v_all, problem)
    final_state = torch.cat((k_all, v_all), -1) if output_final_state else None
    blocks = blocks_of(bounds, before, starts[rank], starts[rank + 1], scores.causal, window)
    return attend(q, k_all, v_all, sinks, blocks, scores, backend=backend), final_state


def _after(state: Tensor | None, k: Tensor, v: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    """Keys and values of each document, after those of its state."""
    if state is None:
        return k, v
    tokens = k.shape[1]
    old_k, old_v = state.split((k.shape[3], v.shape[3]), -1)
    k, v = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
    if len(problem.bounds) == 2:  # one document: in order
        return k, v
    order = keys_of(problem.bounds, problem.before, tokens).to(k.device)
    return k.index_select(1, order), v.index_select(1, order)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floats(name, tensor, "[B, T, H, D]", 4)
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q, k and v must have one dtype and device, got q {q.dtype} on {q.device} and {name} {tensor.dtype} "
                f"on {tensor.device}"
            )
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"q [B, T, H, D], k [B, T, H_kv, D] and v [B, T, H_kv, D_v] must agree in B, T, D and H_kv; got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if 0 in (*q.shape[2:], *v.shape[2:]) or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q's heads must be a multiple of k's and no dim but B and T may be 0; got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}"
        )


def _checked_window(window: int | None, *, causal: bool) -> int | None:
    if window is None:
        return None
    if not causal:
        raise ValueError("window is of the tokens before each token: it needs causal=True")
    return whole("window", window, 1)


def _check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    if sinks is None:
        return
    check_floats("sinks", sinks, "[H]", 1)
    if sinks.shape[0] != q.shape[2] or sinks.device != q.device:
        raise ValueError(
            f"sinks must be [H] = [{q.shape[2]}] on {q.device}, got {tuple(sinks.shape)} on {sinks.device}"
        )


def _check_heads(heads: int, method: str, sp: SequenceParallel | None) -> None:
    if method == "ulysses" and sp is not None and heads % sp.size:
        raise ValueError(
            f"method 'ulysses' gives each rank some of the heads: the {heads} query heads must be a multiple of the "
            f"{sp.size} ranks. Use method='all_gather', or ranks that divide the heads"
        )


def _check_state(initial_state: Tensor | None, k: Tensor, v: Tensor) -> None:
    if initial_state is None:
        return
    check_tensor("initial_state", initial_state, "[B, tokens, H_kv, D + D_v]")
    expected = (k.shape[0], k.shape[2], k.shape[3] + v.shape[3])
    given = tuple(initial_state.shape)
    if len(given) != 4 or (given[0], *given[2:]) != expected or _kind(initial_state) != _kind(k):
        raise ValueError(
            f"initial_state must be [B, tokens, H_kv, D + D_v] = [{expected[0]}, .., {expected[1]}, {expected[2]}], "
            f"{_kind(k)}; got {given}, {_kind(initial_state)}"
        )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device}"


def _rows_before(
    initial_state: Tensor | None, cu_seqlens: Tensor | Sequence[int] | None, documents: int | None
) -> tuple[int, ...]:
    """Row where each document starts in the initial state, and the number of rows. documents: None without packing."""
    rows = 0 if initial_state is None else initial_state.shape[1]
    if cu_seqlens is not None and (documents is None or initial_state is None):
        raise ValueError("initial_cu_seqlens divides initial_state among documents: give cu_seqlens and initial_state")
    if documents is None:
        return (0, rows)
    if initial_state is None:
        return (0,) * (documents + 1)
    if cu_seqlens is None:
        raise ValueError("which document has which rows of initial_state? With cu_seqlens, give initial_cu_seqlens")
    before = document_bounds(cu_seqlens, rows, 1, name="initial_cu_seqlens", whole="initial_state")
    if len(before) != documents + 1:
        raise ValueError(
            f"initial_cu_seqlens must have as many numbers as cu_seqlens, {documents + 1}; got {len(before)}"
        )
    return before


def _called(
    sp: SequenceParallel | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bounds: tuple[int, ...],
    before: tuple[int, ...],
    initial_state: Tensor | None,
    options: tuple[object, ...],
) -> SequenceCall | None:
    """Tell the other ranks what is about to be computed."""
    if sp is None:
        return None
    gradients = tuple(t is not None and t.requires_grad for t in (q, k, v, initial_state, sinks))
    requires_grad = gradients if torch.is_grad_enabled() else None
    rows = None if initial_state is None else document_digest(before)
    sink_dtype = None if sinks is None else str(sinks.dtype)
    key = (q.shape, k.shape, v.shape, q.dtype, rows, options, sink_dtype, requires_grad)

    def fields() -> dict[str, object]:
        return {
            "batch": q.shape[0],
            "tokens (pass lengths= to SequenceParallel for unequal shards)": (
                q.shape[1] if sp.lengths is None else "by lengths"
            ),
            "heads of q and k": (q.shape[2], k.shape[2]),
            "D and D_v": (q.shape[3], v.shape[3]),
            "dtype": str(q.dtype),
            "rows of initial_state": rows,
            "causal, scale, softcap, window, method, backend, output_final_state": options,
            "dtype of sinks": sink_dtype,
            "requires_grad": requires_grad,
        }

    return sp.call("softmax_attention", key, fields, document_digest(bounds), (q, k, v, initial_state))
