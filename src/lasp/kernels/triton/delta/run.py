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
from lasp.kernels.triton.common.launch import Launch, given
from lasp.kernels.triton.common.packing import bounds_of, chunks_of, places_of
from lasp.kernels.triton.decay.channel.stages import interval_matrices
from lasp.kernels.triton.delta.launches import DeltaLaunches
from lasp.recurrence.stages import Gradients


class DeltaRun(NamedTuple):
    """A run as the kernels take it: dense tensors of their dtype, and its launches."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    r: Tensor | None  # an erase key of its own
    launches: DeltaLaunches

    @property
    def reading(self) -> Tensor:
        """Keys with which tokens read."""
        return self.k if self.r is None else self.r

    def tensors(self) -> tuple[Tensor | None, ...]:
        tensors = (self.q, self.k, self.v, self.beta, self.g)
        return tensors if self.r is None else (*tensors, self.r)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> DeltaRun:
        r = tensors[5] if len(tensors) > 5 else None
        return DeltaRun(*tensors[:5], r, self.launches)  # type: ignore[arg-type, call-arg]


class ChannelKeys(NamedTuple):
    """Keys with a gate per channel's decays, r 2^prefix and k 2^suffix [B, T, H_v, K]; the chunks' log-decays
    [B, H_v, chunks, K] (base 2); int32 [B, H_v, chunks], which of them are not bounded."""

    reading: Tensor
    storing: Tensor
    totals: Tensor
    unbounded: Tensor


class DeltaQueries(NamedTuple):
    """Queries as they are before the sweep of outputs.

    Attributes:
        q: as in `DeltaRun`; of a gate per channel scale q 2^prefix [B, T, H_v, K].
        norms: [B, H, chunks C], or None.
        scores: of a gate per channel P [B, H_v, chunks, C, C], or None.
    """

    q: Tensor
    norms: Tensor | None
    scores: Tensor | None


class DeltaChunks(NamedTuple):
    """Matrices and decays made of every chunk before any sweep.

    Attributes:
        inverse: A - I, [B, H_v, chunks, C, C].
        betas: [B, H_v, chunks C].
        bounds: of a gate per token log2 of what passes chunks at most, [B, H_v, chunks]; else betas.
        gates: prefix and, where decays are exact, suffix, likewise; none without a gate per token.
        k_norms: [B, H, chunks C], or None.
        channels: of a gate per channel, or None.
    """

    inverse: Tensor
    betas: Tensor
    bounds: Tensor
    gates: tuple[Tensor, ...]
    k_norms: Tensor | None
    channels: ChannelKeys | None


class DeltaSegments(NamedTuple):
    """Segments' maps of the state: added [B, H_v, segments, K, V] and moves [.., K, K]; None of single ones. And what
    was made on the way."""

    added: Tensor | None
    moves: Tensor | None
    chunks: DeltaChunks
    queries: DeltaQueries | None


class DeltaSaved(NamedTuple):
    """Saved for backward: the state leaving the run, u, those that enter segments (None for zero), and `moves`."""

    leaving: Tensor
    u: Tensor
    entering: Tensor | None
    moves: Tensor | None
    chunks: DeltaChunks
    queries: DeltaQueries


def _fp32(x: DeltaRun, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.v.device)


def _gates(gates: tuple[Tensor, ...], unread: Tensor) -> dict[str, Tensor]:
    """prefix and suffix; `unread` for what there is not."""
    prefix, suffix = (*gates, unread, unread)[:2]
    return {"prefix_ptr": prefix, "suffix_ptr": suffix}


def _norms(x: DeltaRun, tensor: Tensor) -> Tensor | None:
    if not x.launches.normalize:
        return None
    norms = _fp32(x, x.launches.norms)
    x.launches.lengths(x_ptr=tensor, norms_ptr=norms, places_ptr=chunks_of(x.launches.plan, norms))
    return norms


def chunks_made(x: DeltaRun, *, with_queries: bool) -> tuple[DeltaChunks, DeltaQueries | None]:
    """Launch what is made of chunks; with_queries: and of queries, with a gate per channel in the same launch."""
    launches, places = x.launches, chunks_of(x.launches.plan, x.beta)
    gates: tuple[Tensor, ...] = ()
    if launches.kind == TOKEN.value:
        gates = tuple(_fp32(x, launches.slots) for _ in range(2 if launches.plan.exact else 1))
        assert x.g is not None
        if launches.plan.exact:
            launches.gate_sums(g_ptr=x.g, **_gates(gates, gates[0]), places_ptr=places, weight_ptr=None)
    norms = _norms(x, x.k)
    inverse, betas = x.v.new_empty(launches.tiles), _fp32(x, launches.slots)
    bounds = _fp32(x, launches.bounds) if launches.bounds_chunks else betas
    keys, overlaps, queries = None, betas, None
    if launches.per_channel:
        reading, storing = (x.v.new_empty(launches.operands) for _ in range(2))
        totals, overlaps = _fp32(x, launches.totals), _fp32(x, launches.tiles)
        keys = ChannelKeys(reading, storing, totals, torch.empty_like(totals[..., 0], dtype=torch.int32))
        queries = _channels_made(x, keys, norms, overlaps, with_queries=with_queries, with_keys=True)
    elif with_queries:
        queries = DeltaQueries(x.q, _norms(x, x.q), None)
    launches.solve(
        k_ptr=x.k,
        r_ptr=x.reading,
        norms_ptr=given(norms, betas),
        overlaps_ptr=overlaps,
        beta_ptr=x.beta,
        g_ptr=given(x.g, x.beta),
        prefix_ptr=gates[0] if gates else betas,
        inverse_ptr=inverse,
        betas_ptr=betas,
        bounds_ptr=bounds,
        places_ptr=places,
    )
    return DeltaChunks(inverse, betas, bounds, gates, norms, keys), queries


def _intervals(x: DeltaRun) -> Tensor:
    return interval_matrices(x.launches.plan.chunk, x.launches.plan.exact, x.v.device)


def _channels_made(
    x: DeltaRun, keys: ChannelKeys, k_norms: Tensor | None, overlaps: Tensor, *, with_queries: bool, with_keys: bool
) -> DeltaQueries | None:
    """Writes `keys` and L of every chunk, and gives what queries have, as is wanted."""
    launches = x.launches
    (reading, storing, totals, unbounded), q, q_norms, queries, scores = keys, x.k, None, keys.reading, keys.reading
    if with_queries:
        q, q_norms, queries, scores = (
            x.q,
            _norms(x, x.q),
            x.v.new_empty(launches.operands),
            x.v.new_empty(launches.tiles),
        )
    assert x.g is not None
    shared: dict[str, Tensor] = {
        "q_ptr": q,
        "k_ptr": x.k,
        "r_ptr": x.reading,
        "g_ptr": x.g,
        "q_norms_ptr": given(q_norms, totals),
        "k_norms_ptr": given(k_norms, totals),
        "intervals_ptr": _intervals(x),
        "scores_ptr": scores,
        "overlaps_ptr": overlaps,
        "unbounded_ptr": unbounded,
        "places_ptr": chunks_of(launches.plan, x.beta),
    }
    own = {"queries_ptr": queries, "reading_ptr": reading, "storing_ptr": storing, "totals_ptr": totals}
    launches.channel_operands(queries=with_queries, keys=with_keys)(**shared, **own)
    launches.channel_scores(queries=with_queries, keys=with_keys)(**shared)
    return DeltaQueries(queries, q_norms, scores) if with_queries else None


def queries_made(x: DeltaRun, segments: DeltaSegments) -> DeltaQueries:
    """Queries before the sweep of outputs, made now unless they were with the keys."""
    if segments.queries is not None:
        return segments.queries
    keys, k_norms = segments.chunks.channels, segments.chunks.k_norms
    if keys is None:
        return DeltaQueries(x.q, _norms(x, x.q), None)
    queries = _channels_made(x, keys, k_norms, keys.totals, with_queries=True, with_keys=False)
    assert queries is not None
    return queries


def _sweep_operands(x: DeltaRun, chunks: DeltaChunks, unread: Tensor) -> dict[str, Tensor]:
    """Operands of all sweeps: keys, by how much chunks decay, and what was made of them."""
    reading, storing, decays = (x.reading, x.k, unread) if chunks.channels is None else chunks.channels[:3]
    return {
        "reading_ptr": reading,
        "storing_ptr": storing,
        "inverse_ptr": chunks.inverse,
        "beta_ptr": chunks.betas,
        **_gates(chunks.gates, unread),
        "totals_ptr": decays,
    }


def _query_operands(x: DeltaRun, chunks: DeltaChunks, queries: DeltaQueries, unread: Tensor) -> dict[str, Tensor]:
    """Operands of sweeps with queries, beside those of all sweeps."""
    return {
        "q_ptr": queries.q,
        "scores_ptr": given(queries.scores, x.v),
        "q_norms_ptr": given(queries.norms, unread),
        "k_norms_ptr": given(chunks.k_norms, unread),
        "g_ptr": given(x.g, unread),
    }


def totals(x: DeltaRun, *, summarized: bool) -> DeltaSegments:
    """summarized: for an exchange, which is to begin before there are queries."""
    chunks, queries = chunks_made(x, with_queries=not summarized)
    if x.launches.plan.whole and not summarized:
        return DeltaSegments(None, None, chunks, queries)
    return DeltaSegments(*summaries(x, chunks), chunks, queries)


def summaries(x: DeltaRun, chunks: DeltaChunks) -> tuple[Tensor, Tensor]:
    """Launch the summaries: what segments add to the state, and their transitions."""
    launches = x.launches
    added, moves = _fp32(x, launches.states), _fp32(x, launches.moves)
    launches.summary(
        **_sweep_operands(x, chunks, added),
        v_ptr=x.v,
        norms_ptr=given(chunks.k_norms, added),
        bounds_ptr=chunks.bounds,
        added_ptr=added,
        moves_ptr=moves,
        places_ptr=places_of(launches.plan, added),
    )
    return added, moves


def entering_segments(x: DeltaRun, added: Tensor, moves: Tensor, outside: Tensor | None, *, reverse: bool) -> Tensor:
    """States that enter segments, where `outside` enters the run, or nothing if None."""
    entering = torch.empty_like(added)
    x.launches.scan(leaves=False, reverse=reverse)(
        added_ptr=added,
        moves_ptr=moves,
        entering_ptr=entering,
        leaving_ptr=added,
        products_ptr=added,
        transition_ptr=added,
        bounds_ptr=bounds_of(x.launches.plan, added),
        outside_ptr=outside,
    )
    return entering


def run_of_segments(x: DeltaRun, added: Tensor, moves: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """Returns what the run adds to a state that enters it, and its transition [B or documents, H_v, K, K].

    reverse: of the gradient, from the end, and transposed.
    """
    launches = x.launches
    leaving, transition = _fp32(x, launches.state), _fp32(x, launches.transition)
    launches.scan(leaves=True, reverse=reverse)(
        added_ptr=added,
        moves_ptr=moves,
        entering_ptr=torch.empty_like(added),
        leaving_ptr=leaving,
        products_ptr=torch.empty_like(moves),
        transition_ptr=transition,
        bounds_ptr=bounds_of(launches.plan, added),
        outside_ptr=None,
    )
    return leaving, transition


def outputs(
    x: DeltaRun, segments: DeltaSegments, queries: DeltaQueries, state_in: Tensor | None
) -> tuple[Tensor, DeltaSaved]:
    """state_in is zero if None."""
    launches, chunks = x.launches, segments.chunks
    entering = state_in
    if segments.added is not None and not launches.plan.whole:
        assert segments.moves is not None
        entering = entering_segments(x, segments.added, segments.moves, state_in, reverse=False)
    o, u, leaving = torch.empty_like(x.v), torch.empty_like(x.v), _fp32(x, launches.state)
    launches.output(
        **_sweep_operands(x, chunks, leaving),
        **_query_operands(x, chunks, queries, leaving),
        v_ptr=x.v,
        o_ptr=o,
        u_ptr=u,
        state_out_ptr=leaving,
        places_ptr=places_of(launches.plan, leaving),
        entering_ptr=entering,
    )
    if x.v.numel() == 0:  # no kernel ran
        leaving.zero_() if state_in is None else leaving.copy_(state_in)
    return o, DeltaSaved(leaving, u, entering, segments.moves, chunks, queries)


def totals_adjoint(x: DeltaRun, saved: DeltaSaved, d_o: Tensor, *, summarized: bool) -> Tensor | None:
    """Launch what segments add to the gradient of the state; None where there is but one and it is not wanted."""
    launches = x.launches
    if launches.plan.whole and not summarized:
        return None
    added = _fp32(x, launches.states)
    launch = launches.whole_adjoint if summarized else launches.adjoint
    _reverse(x, saved, d_o, launch, added, added, (added,) * 3, None)
    return added


def _reverse(
    x: DeltaRun,
    saved: DeltaSaved,
    d_o: Tensor,
    launch: Launch,
    added: Tensor,
    dv: Tensor,
    d_chunks: tuple[Tensor, Tensor, Tensor],
    entering: Tensor | None,
) -> None:
    rest = {"d_rest_ptr": d_chunks[1]} if x.launches.own else {}
    launch(
        **_sweep_operands(x, saved.chunks, saved.leaving),
        **_query_operands(x, saved.chunks, saved.queries, saved.leaving),
        do_ptr=d_o,
        bounds_ptr=saved.chunks.bounds,
        added_ptr=added,
        dv_ptr=dv,
        d_chunks_ptr=d_chunks[0],
        d_tail_ptr=d_chunks[2],
        **rest,
        places_ptr=places_of(x.launches.plan, saved.leaving),
        entering_ptr=entering,
    )


def gradients(
    x: DeltaRun, saved: DeltaSaved, added: Tensor | None, d_o: Tensor, d_state_out: Tensor | None
) -> Gradients:
    """Gradients of q, k, v, beta, g and, if there is one, of the erase key; d_state_out is zero if None."""
    launches, chunks, unread = x.launches, saved.chunks, saved.leaving
    entering = d_state_out
    if added is not None and not launches.plan.whole:
        assert saved.moves is not None
        entering = entering_segments(x, added, saved.moves, d_state_out, reverse=True)
    dv, dg = torch.empty_like(x.v), _gate_gradient(x)
    dq, dk, *erasing = (
        x.q.new_empty(launches.gradient, dtype=launches.gradient_dtype) for _ in range(3 if launches.erases else 2)
    )
    if launches.joined:
        # A chunk's D is as large as its dq and dk, which are written after it has been read. Of a segment's last chunk,
        # whose tokens may be too few to hold it, it is what enters the segment.
        d_chunks = dq.view(x.v.dtype), dk.view(x.v.dtype), unread
        entering = _fp32(x, launches.state).zero_() if entering is None else entering
    elif launches.placed:
        # S lies in the place of dq and dk, D in that of dg: a program has read them where it writes. Those of a run's
        # last chunk, whose tokens may be too few, have room of their own.
        assert dg is not None
        s_chunks = dq.view(x.v.dtype), dk.view(x.v.dtype), x.v.new_empty(launches.tails)
        places = dg.view(x.v.dtype)
        d_chunks = places, places.view(-1)[launches.plan.chunk :], x.v.new_empty(launches.tails)
    else:
        d_chunks = (x.v.new_empty(launches.state_chunks),) * 3
    _reverse(x, saved, d_o, launches.values, unread, dv, d_chunks, entering)
    d_beta, q_norms = _fp32(x, tuple(x.beta.shape)), saved.queries.norms
    shared = {
        "q_ptr": x.q,
        "k_ptr": x.k,
        "do_ptr": d_o,
        "u_ptr": saved.u,
        "dv_ptr": dv,
        "q_norms_ptr": given(q_norms, unread),
        "k_norms_ptr": given(chunks.k_norms, unread),
        "beta_ptr": chunks.betas,
        "dq_ptr": dq,
        "dk_ptr": dk,
        "d_beta_ptr": d_beta,
    }
    if launches.joined:
        launches.joined_gradients(
            **shared,
            prefix_ptr=chunks.gates[0] if chunks.gates else unread,
            dg_ptr=given(dg, unread),
            d_first_ptr=d_chunks[0],
            d_rest_ptr=d_chunks[1],
            d_entering_ptr=entering,
            places_ptr=places_of(launches.plan, unread),
            entering_ptr=saved.entering,
        )
    else:
        if not launches.placed:
            s_chunks = (x.v.new_empty(launches.state_chunks),) * 3
        _chunk_states(x, saved, s_chunks)
        shared |= {
            "r_ptr": x.reading,
            "dr_ptr": erasing[0] if erasing else dk,
            "g_ptr": given(x.g, unread),
            "s_chunks_ptr": s_chunks[0],
            "d_chunks_ptr": d_chunks[0],
            "places_ptr": chunks_of(launches.plan, unread),
        }
        if chunks.channels is not None:
            own = {
                "intervals_ptr": _intervals(x),
                "unbounded_ptr": chunks.channels.unbounded,
                "s_rest_ptr": s_chunks[1],
                "s_tail_ptr": s_chunks[2],
                "d_tail_ptr": d_chunks[2],
            }
            for bounded in (True, False) if launches.bounded else (False,):
                launches.channel_gradients(bounded=bounded)(**shared, **own, dg_ptr=given(dg, unread))
        else:
            parts = _fp32(x, launches.gates) if launches.with_gate else unread
            if launches.own:
                shared["places_ptr"] = places_of(launches.plan, unread)
            launches.gradients(**shared, **_gates(chunks.gates, unread), dg_ptr=parts)
            if launches.with_gate:
                dg = parts[0] if parts.shape[0] == 1 else parts.sum(0)
    if launches.summed:
        dq, dk = _summed(x, x.q, dq, q_norms), _summed(x, x.k, dk, chunks.k_norms)
        erasing = [_summed(x, x.reading, dr, None) for dr in erasing]
    return dq, dk, dv, d_beta, dg, *erasing


def _gate_gradient(x: DeltaRun) -> Tensor | None:
    """Returns memory for the gate's gradient; None if there is none, or if it will be a sum of parts."""
    launches = x.launches
    if not launches.with_gate or not (launches.joined or launches.per_channel):
        return None
    return _fp32(x, launches.operands if launches.per_channel else tuple(x.beta.shape))


def _chunk_states(x: DeltaRun, saved: DeltaSaved, s_chunks: tuple[Tensor, Tensor, Tensor]) -> None:
    """Launch what makes S at the start of every chunk, transposed."""
    launches, chunks, unread = x.launches, saved.chunks, saved.leaving
    operands = _sweep_operands(x, chunks, unread)
    launches.chunk_states(
        storing_ptr=operands["storing_ptr"],
        u_ptr=saved.u,
        norms_ptr=given(chunks.k_norms, unread),
        **_gates(chunks.gates, unread),
        totals_ptr=operands["totals_ptr"],
        s_chunks_ptr=s_chunks[0],
        s_rest_ptr=s_chunks[1],
        s_tail_ptr=s_chunks[2],
        places_ptr=places_of(launches.plan, unread),
        entering_ptr=saved.entering,
    )


def _summed(x: DeltaRun, tensor: Tensor, partial: Tensor, norms: Tensor | None) -> Tensor:
    """[B, T, H_v, K] -> [B, T, H, K], of the tensor as it was before it was divided by its length."""
    gradient = torch.empty_like(tensor)
    x.launches.key_gradient_sum(
        x_ptr=tensor,
        partial_ptr=partial,
        gradient_ptr=gradient,
        places_ptr=chunks_of(x.launches.plan, partial),
        norms_ptr=norms,
    )
    return gradient
