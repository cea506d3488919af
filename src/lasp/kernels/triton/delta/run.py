"""The delta rule's launches, in their order.

A of every chunk, what every segment does to the state, scan over segments; sweep of o and u. Backward: sweep of D,
reversed scan; sweep of dv, which leaves D at every chunk's end; sweep of S, likewise; the rest chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.triton.common.decays import TOKEN
from lasp.kernels.triton.common.launch import Launch
from lasp.kernels.triton.common.packing import bounds_of, chunks_of, given, places_of
from lasp.kernels.triton.decay.channel.stages import stretch_matrices
from lasp.kernels.triton.delta.launches import DeltaLaunches
from lasp.recurrence.inputs import NORM_EPS


class DeltaRun(NamedTuple):
    """A run as the kernels take it: dense tensors of their dtype, values cut into as many heads as that takes
    (`DeltaLaunches.pieces`), and its launches."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    work: DeltaLaunches

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.beta, self.g

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> DeltaRun:
        return DeltaRun(*tensors, self.work)  # type: ignore[arg-type]


class ChannelKeys(NamedTuple):
    """Keys with a gate per channel's decays, k 2^prefix and k 2^suffix [B, T, H_v, K]; the chunks' log-decays
    [B, H_v, chunks, K] (base 2); int32 [B, H_v, chunks], which of them are not mild."""

    reading: Tensor
    storing: Tensor
    totals: Tensor
    steep: Tensor


class DeltaQueries(NamedTuple):
    """What queries have before the sweep of outputs.

    Attributes:
        q: as in `DeltaRun`; of a gate per channel scale q 2^prefix [B, T, H_v, K].
        norms: [B, H, chunks C], or None.
        scores: of a gate per channel P [B, H_v, chunks, C, C], or None.
    """

    q: Tensor
    norms: Tensor | None
    scores: Tensor | None


class DeltaChunks(NamedTuple):
    """What is made of every chunk before any sweep.

    Attributes:
        inverse: A - I, [B, H_v, chunks, C, C].
        betas: [B, H_v, chunks C].
        gates: prefix and, where decays are exact, suffix, likewise; none without a gate per token.
        k_norms: [B, H, chunks C], or None.
        channels: of a gate per channel, or None.
    """

    inverse: Tensor
    betas: Tensor
    gates: tuple[Tensor, ...]
    k_norms: Tensor | None
    channels: ChannelKeys | None


class DeltaSegments(NamedTuple):
    """What segments do to the state: added [B, H_v, segments, K, V] and moves [.., K, K]; None of single ones. And what
    was made on the way."""

    added: Tensor | None
    moves: Tensor | None
    chunks: DeltaChunks
    queries: DeltaQueries | None


class DeltaSaved(NamedTuple):
    """What backward needs: the state leaving the run, u, those that enter segments (None for zero), and `moves`."""

    leaving: Tensor
    u: Tensor
    entering: Tensor | None
    moves: Tensor | None
    chunks: DeltaChunks
    queries: DeltaQueries


def _fp32(x: DeltaRun, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.v.device)


def _two(gates: tuple[Tensor, ...], unread: Tensor) -> tuple[Tensor, ...]:
    """prefix and suffix; `unread` for what there is not."""
    return (*gates, unread, unread)[:2]


def _norms(x: DeltaRun, tensor: Tensor) -> Tensor | None:
    if not x.work.normalize:
        return None
    norms = _fp32(x, x.work.norms)
    x.work.norms_of(NORM_EPS)(tensor, norms, chunks_of(x.work.plan, norms))
    return norms


def chunks_made(x: DeltaRun, *, with_queries: bool) -> tuple[DeltaChunks, DeltaQueries | None]:
    """What is made of chunks; with_queries: also what is made of queries, of a gate per channel in the same launch."""
    work, places = x.work, chunks_of(x.work.plan, x.beta)
    gates: tuple[Tensor, ...] = ()
    if work.kind == TOKEN.value:
        gates = tuple(_fp32(x, work.slots) for _ in range(2 if work.plan.exact else 1))
        assert x.g is not None
        work.gate_sums(x.g, *_two(gates, gates[0]), places)
    norms = _norms(x, x.k)
    inverse, betas = x.v.new_empty(work.tiles), _fp32(x, work.slots)
    g, unread, keys, overlaps, queries = given(x.g, x.beta), betas, None, betas, None
    if work.per_channel:
        reading, storing = (x.v.new_empty(work.operands) for _ in range(2))
        totals, overlaps = _fp32(x, work.totals), _fp32(x, work.tiles)
        keys = ChannelKeys(reading, storing, totals, torch.empty_like(totals[..., 0], dtype=torch.int32))
        queries = _channels_made(x, keys, norms, overlaps, with_queries=with_queries, with_keys=True)
    elif with_queries:
        queries = DeltaQueries(x.q, _norms(x, x.q), None)
    work.solve(
        x.k, given(norms, unread), overlaps, x.beta, g, _two(gates, unread)[0], inverse, betas, places
    )  # fmt: skip
    return DeltaChunks(inverse, betas, gates, norms, keys), queries


def _stretches(x: DeltaRun) -> Tensor:
    return stretch_matrices(x.work.plan.chunk, x.work.plan.exact, x.v.device)


def _channels_made(
    x: DeltaRun, keys: ChannelKeys, k_norms: Tensor | None, overlaps: Tensor, *, with_queries: bool, with_keys: bool
) -> DeltaQueries | None:
    """Writes `keys` and L of every chunk, and gives what queries have, as is wanted."""
    work, places, stretches = x.work, chunks_of(x.work.plan, x.beta), _stretches(x)
    (reading, storing, totals, steep), q, q_norms, queries, scores = keys, x.k, None, keys.reading, keys.reading
    if with_queries:
        q, q_norms, queries, scores = x.q, _norms(x, x.q), x.v.new_empty(work.operands), x.v.new_empty(work.tiles)
    assert x.g is not None
    inputs = (q, x.k, x.g, given(q_norms, totals), given(k_norms, totals), stretches)
    work.channel_operands(queries=with_queries, keys=with_keys)(
        *inputs, queries, reading, storing, totals, scores, overlaps, steep, places
    )
    for of_queries in (*([True] if with_queries else []), *([False] if with_keys else [])):
        work.channel_scores(queries=of_queries)(*inputs, scores, overlaps, steep, places)
    return DeltaQueries(queries, q_norms, scores) if with_queries else None


def queries_made(x: DeltaRun, segments: DeltaSegments) -> DeltaQueries:
    """What queries have, unless it has been made with the keys'."""
    if segments.queries is not None:
        return segments.queries
    keys, k_norms = segments.chunks.channels, segments.chunks.k_norms
    if keys is None:
        return DeltaQueries(x.q, _norms(x, x.q), None)
    queries = _channels_made(x, keys, k_norms, keys.totals, with_queries=True, with_keys=False)
    assert queries is not None
    return queries


def _sweep_keys(x: DeltaRun, chunks: DeltaChunks) -> tuple[Tensor, Tensor, Tensor]:
    """The keys that read, those that are written at, and by how much chunks decay."""
    if chunks.channels is None:
        return x.k, x.k, chunks.betas
    return chunks.channels[:3]


def totals(x: DeltaRun, *, summarized: bool) -> DeltaSegments:
    """summarized: for an exchange, which is to begin before there are queries."""
    chunks, queries = chunks_made(x, with_queries=not summarized)
    if x.work.plan.whole and not summarized:
        return DeltaSegments(None, None, chunks, queries)
    return DeltaSegments(*summaries(x, chunks), chunks, queries)


def summaries(x: DeltaRun, chunks: DeltaChunks) -> tuple[Tensor, Tensor]:
    """What segments add to the state, and their transitions."""
    work = x.work
    added, moves = _fp32(x, work.states), _fp32(x, work.moves)
    reading, storing, decays = _sweep_keys(x, chunks)
    work.summary(
        reading, storing, x.v, chunks.inverse, chunks.betas, given(chunks.k_norms, added),
        *_two(chunks.gates, added), decays, added, moves, places_of(work.plan, added),
    )  # fmt: skip
    return added, moves


def scanned(
    x: DeltaRun, added: Tensor, moves: Tensor, outside: Tensor | None, *, leaves: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """States that enter segments; and the one that leaves the run, where `leaves`."""
    work, entering = x.work, torch.empty_like(added)
    leaving = _fp32(x, work.state) if leaves else entering
    launch = work.scan(given=outside is not None, leaves=leaves, reverse=reverse)
    launch(added, moves, entering, leaving, bounds_of(work.plan, added), given(outside, added))
    return entering, leaving


def transition_of(x: DeltaRun, moves: Tensor, *, reverse: bool) -> Tensor:
    """[B or documents, H_v, K, K]: what the run does to the state that enters it; transposed if `reverse`."""
    leaving = _fp32(x, x.work.transition)
    bounds = bounds_of(x.work.plan, moves)
    x.work.transition_scan(reverse=reverse)(moves, moves, torch.empty_like(moves), leaving, bounds, moves)
    return leaving


def outputs(
    x: DeltaRun, segments: DeltaSegments, queries: DeltaQueries, state_in: Tensor | None
) -> tuple[Tensor, DeltaSaved]:
    """state_in is zero if None."""
    work, chunks = x.work, segments.chunks
    entering = state_in
    if segments.added is not None and not work.plan.whole:
        assert segments.moves is not None
        entering, _ = scanned(x, segments.added, segments.moves, state_in, leaves=False, reverse=False)
    o, u, leaving = torch.empty_like(x.v), torch.empty_like(x.v), _fp32(x, work.state)
    unread = leaving
    reading, storing, decays = _sweep_keys(x, chunks)
    work.output(
        queries.q, reading, storing, x.v, chunks.inverse, given(queries.scores, x.v), chunks.betas,
        given(queries.norms, unread), given(chunks.k_norms, unread), given(x.g, unread), *_two(chunks.gates, unread),
        decays, o, u, leaving, places_of(work.plan, unread), entering,
    )  # fmt: skip
    if x.v.numel() == 0:  # no kernel ran
        leaving.zero_() if state_in is None else leaving.copy_(state_in)
    return o, DeltaSaved(leaving, u, entering, segments.moves, chunks, queries)


def totals_adjoint(x: DeltaRun, saved: DeltaSaved, d_o: Tensor, *, summarized: bool) -> Tensor | None:
    """What segments add to the gradient of the state; None where there is but one and it is not wanted."""
    work = x.work
    if work.plan.whole and not summarized:
        return None
    added = _fp32(x, work.states)
    launch = work.whole_adjoint if summarized else work.adjoint
    _reverse(x, saved, d_o, launch, added, added, added, None)
    return added


def _reverse(
    x: DeltaRun,
    saved: DeltaSaved,
    d_o: Tensor,
    launch: Launch,
    added: Tensor,
    dv: Tensor,
    d_chunks: Tensor,
    entering: Tensor | None,
) -> None:
    chunks, queries, unread = saved.chunks, saved.queries, saved.leaving
    reading, storing, decays = _sweep_keys(x, chunks)
    launch(
        queries.q, reading, storing, d_o, chunks.inverse, given(queries.scores, d_o), chunks.betas,
        given(queries.norms, unread), given(chunks.k_norms, unread), given(x.g, unread), *_two(chunks.gates, unread),
        decays, added, dv, d_chunks, places_of(x.work.plan, unread), entering,
    )  # fmt: skip


def gradients(
    x: DeltaRun, saved: DeltaSaved, added: Tensor | None, d_o: Tensor, d_state_out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Of q, k, v, beta and g; d_state_out is zero if None."""
    work, chunks, unread = x.work, saved.chunks, saved.leaving
    entering = d_state_out
    if added is not None and not work.plan.whole:
        assert saved.moves is not None
        entering, _ = scanned(x, added, saved.moves, d_state_out, leaves=False, reverse=True)
    dv = torch.empty_like(x.v)
    s_chunks, d_chunks = (x.v.new_empty(work.state_chunks) for _ in range(2))
    _reverse(x, saved, d_o, work.values, unread, dv, d_chunks, entering)
    _, storing, decays = _sweep_keys(x, chunks)
    passing = _fp32(x, work.passing) if work.with_gate else unread
    work.chunk_states(
        storing, saved.u, given(chunks.k_norms, unread), *_two(chunks.gates, unread), decays, s_chunks,
        d_chunks, passing, places_of(work.plan, unread), saved.entering,
    )  # fmt: skip
    dq, dk = (x.q.new_empty(work.gradient, dtype=work.gradient_dtype) for _ in range(2))
    d_beta, q_norms = _fp32(x, tuple(x.beta.shape)), saved.queries.norms
    places, norms = places_of(work.plan, unread), (given(q_norms, unread), given(chunks.k_norms, unread))
    dg: Tensor | None = None
    if chunks.channels is not None:
        steep = chunks.channels.steep
        dg = _fp32(x, work.operands) if work.with_gate else None
        for mild in (True, False) if work.mild else (False,):
            work.channel_gradients(mild=mild)(
                x.q, x.k, d_o, saved.u, dv, x.g, *norms, chunks.betas, _stretches(x), steep, passing, s_chunks,
                d_chunks,
                dq, dk, d_beta, given(dg, unread), places,
            )  # fmt: skip
    else:
        parts = _fp32(x, work.gates) if work.with_gate else unread
        work.gradients(
            x.q, x.k, d_o, saved.u, dv, chunks.betas, *norms, given(x.g, unread), *_two(chunks.gates, unread),
            passing, s_chunks, d_chunks, dq, dk, d_beta, parts, places,
        )  # fmt: skip
        dg = parts.sum(0) if work.with_gate else None
    if work.summed:
        dq, dk = _summed(x, x.q, dq, q_norms), _summed(x, x.k, dk, chunks.k_norms)
    return dq, dk, dv, d_beta, dg


def _summed(x: DeltaRun, tensor: Tensor, partial: Tensor, norms: Tensor | None) -> Tensor:
    """[B, T, H_v, K] -> [B, T, H, K], of the tensor as it was before it was divided by its length."""
    gradient = torch.empty_like(tensor)
    x.work.key_gradient_sum(tensor, partial, gradient, chunks_of(x.work.plan, partial), norms)
    return gradient
