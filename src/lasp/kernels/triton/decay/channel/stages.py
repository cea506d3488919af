"""The stages for a gate per key channel; `stages` gives the same names for every kind of decay."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.triton.common.packing import chunks_of, given, places_of
from lasp.kernels.triton.decay.inputs import DecayRun
from lasp.kernels.triton.decay.launches import BASE_LEVELS
from lasp.kernels.triton.decay.plan import LaunchPlan


class ChannelSegments(NamedTuple):
    """States [B, H_v, segments, K, V] at one end of each segment, and decays [B, H_v, segments, K] (base 2) from the
    run's end on that side to them; None where a segment is a whole run. prepared: where it was made before."""

    states: Tensor | None
    decays: Tensor | None
    prepared: Prepared | None = None


class Prepared(NamedTuple):
    """Per chunk: scores [B, H_v, T, C], scale q 2^prefix and k 2^suffix [B, T, H_v, K], the chunks' log-decays
    [B, H_v, chunks, K] (base 2), and int32 [B, H_v, chunks], which of them `channel_bounded_prepare` has marked."""

    scores: Tensor
    from_start: Tensor
    to_end: Tensor
    totals: Tensor
    unbounded: Tensor


class ChannelSaved(NamedTuple):
    """States entering each segment [B, H_v, segments, K, V], or None where a segment is a whole run; the state leaving
    the run [B, H_v, K, V]; what was prepared per chunk."""

    entering: Tensor | None
    leaving: Tensor
    prepared: Prepared


class QueryReads(NamedTuple):
    """What do reads from the states [B, T, H_v, K], and what that adds to dg, per chunk [B, H_v, chunks, K]."""

    read_q: Tensor
    sums: Tensor


@functools.cache
def stretch_matrices(chunk: int, exact: bool, device: torch.device) -> Tensor:
    """[2 + levels, C, C], fp32 if `exact` else fp16: at each level, row i sums the gates between token i and the middle
    of its block; before them that of the whole chunk and that of the base blocks, negative where i is early.

    The levels are those at which tokens of a chunk meet, see channel_prepare.
    """
    i, j = torch.arange(chunk)[:, None], torch.arange(chunk)[None, :]
    levels = range(chunk.bit_length() - 1)
    late = [(i >> level) % 2 == 1 for level in levels]
    matrices = [((i >> n == j >> n) & torch.where(late[n], j <= i, j > i)).float() for n in levels]
    signed = [torch.where(late[n], matrices[n], -matrices[n]) for n in (levels[-1], BASE_LEVELS - 1)]
    return torch.stack([*signed, *matrices]).to(device, torch.float32 if exact else torch.float16)


def empty_prepared(q: Tensor, v: Tensor, p: LaunchPlan) -> Prepared:
    (B, T, H_v, _), K = v.shape, q.shape[3]
    scores = q.new_empty(B, H_v, T, p.chunk)
    from_start, to_end = (q.new_empty(B, T, H_v, K) for _ in range(2))
    totals = q.new_empty(B, H_v, p.chunks, K, dtype=torch.float32)
    return Prepared(scores, from_start, to_end, totals, q.new_empty(B, H_v, p.chunks, dtype=torch.int32))


def local_outputs(x: DecayRun) -> Prepared:
    work, p = x.work, x.work.plan
    ready = empty_prepared(x.q, x.v, p)
    stretches = stretch_matrices(p.chunk, p.exact, x.q.device)
    places = chunks_of(p, ready.totals)
    if work.bounded:
        work.channel_bounded_prepare(x.q, x.k, x.g, stretches, *ready, places)
    work.channel_prepare(x.q, x.k, x.g, stretches, *ready, places)
    return ready


def outputs(
    x: DecayRun, totals: ChannelSegments, ready: Prepared, o: Tensor, leaving: Tensor, state_in: Tensor | None
) -> ChannelSaved:
    work, states, before = x.work, given(totals.states, leaving), given(totals.decays, leaving)
    work.channel_output(
        ready.from_start, ready.to_end, x.v, ready.totals, ready.scores, o, states, before, leaving,
        places_of(work.plan, leaving), state_in,
    )  # fmt: skip
    return ChannelSaved(totals.states, leaving, ready)


def local_gradients(x: DecayRun, saved: ChannelSaved, d_o: Tensor) -> QueryReads:
    work, ready = x.work, saved.prepared
    read_q = x.q.new_empty(work.gradient, dtype=read_dtype(x.q.dtype))
    sums = torch.empty_like(ready.totals)
    work.channel_query_inter_chunk(
        ready.from_start, ready.to_end, x.v, d_o, ready.totals, read_q, sums,
        given(saved.entering, saved.leaving), places_of(work.plan, sums),
    )  # fmt: skip
    return QueryReads(read_q, sums)


def gradients(
    x: DecayRun,
    saved: ChannelSaved,
    adjoint: ChannelSegments,
    local: QueryReads,
    d_o: Tensor,
    d_state_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq and dk per value head; dv; dg."""
    work, p, ready = x.work, x.work.plan, saved.prepared
    assert x.g is not None
    tensors = (saved.entering, adjoint.states, adjoint.decays)
    entering, d_states, after = (given(tensor, saved.leaving) for tensor in tensors)
    places = places_of(p, d_states)
    read_k, through = torch.empty_like(local.read_q), torch.empty_like(local.sums)
    work.channel_key_inter_chunk(
        ready.from_start, ready.to_end, x.v, d_o, ready.totals, read_k, local.sums, through,
        entering, saved.leaving, d_states, after, places, d_state_out,
    )  # fmt: skip
    dq = x.q.new_empty(work.gradient, dtype=work.gradient_dtype)
    dk, dg = torch.empty_like(dq), through.new_empty(work.gradient)
    stretches = stretch_matrices(p.chunk, p.exact, x.q.device)
    operands = (x.q, x.k, x.v, d_o, x.g, stretches, ready.unbounded, local.read_q, read_k, through, dq, dk, dg)
    if work.bounded:
        work.channel_bounded_intra_chunk(*operands, chunks_of(p, through))
    work.channel_intra_chunk(*operands, chunks_of(p, through))
    dv = torch.empty_like(x.v)
    work.channel_value_gradient(
        ready.from_start, ready.to_end, d_o, ready.totals, ready.scores, dv, d_states, after, places, d_state_out
    )
    return dq, dk, dv, dg


def read_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is read from states lacks their decays: it may exceed fp16's range."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
