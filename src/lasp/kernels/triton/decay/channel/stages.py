"""The stages for a gate per key channel; `stages` gives the same names for every kind of decay."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.triton.common.launch import given
from lasp.kernels.triton.decay.channel.launches import BASE_LEVELS, ChannelLaunches
from lasp.kernels.triton.decay.launches import SegmentSums
from lasp.kernels.triton.decay.plan import LaunchPlan
from lasp.recurrence.inputs import Inputs


class ChannelSegments(NamedTuple):
    """States [B, H_v, segments, K, V] at one end of each segment, and decays [B, H_v, segments, K] (base 2) from the
    run's end on that side to them; None where a segment is a whole run. prepared: where it was made before."""

    states: Tensor | None
    decays: Tensor | None
    prepared: Prepared | None = None


class Prepared(NamedTuple):
    """Per chunk: scores [B, H_g, T, C], scale q 2^prefix and k 2^suffix [B, T, H_g, K], the chunks' log-decays
    [B, H_g, chunks, K] (base 2), and int32 [B, H_g, chunks], which of them `channel_bounded_prepare` has marked; H_g:
    heads of gates."""

    scores: Tensor
    from_start: Tensor
    to_end: Tensor
    totals: Tensor
    unbounded: Tensor


class QueryReads(NamedTuple):
    """Reads by do from the states [B, T, H_v, K]; what they add to dg, per chunk [B, H_v, chunks, K]; and the states
    before intervals (`DecayLaunches.inner`)."""

    read_q: Tensor
    sums: Tensor
    inner: Tensor


@functools.cache
def interval_matrices(chunk: int, exact: bool, device: torch.device) -> Tensor:
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


def empty_prepared(q: Tensor, g: Tensor, p: LaunchPlan) -> Prepared:
    B, T, H_g, K = g.shape
    scores = q.new_empty(B, H_g, T, p.chunk)
    from_start = q.new_empty(B, T, H_g, K)
    totals = q.new_empty(B, H_g, p.chunks, K, dtype=torch.float32)
    unbounded = q.new_empty(B, H_g, p.chunks, dtype=torch.int32)
    return Prepared(scores, from_start, torch.empty_like(from_start), totals, unbounded)


def summarize(
    x: Inputs, launches: ChannelLaunches, sums: SegmentSums, ready: Prepared | None, v: Tensor, *, reverse: bool
) -> None:
    """Write the sums of every segment, from the inputs or from what was prepared; reverse: of the gradient v of
    outputs."""
    states, decays = sums
    written = {"totals_ptr": states, "decays_ptr": decays, "places_ptr": given(launches.places, states)}
    if ready is None:
        launches.summary(k_ptr=x.k, v_ptr=v, g_ptr=x.g, **written)
        return
    launch = launches.summary_adjoint if reverse else launches.prepared_summary
    operand = ready.from_start if reverse else ready.to_end
    launch(k_ptr=operand, v_ptr=v, g_ptr=ready.totals, **written)


def local_outputs(x: Inputs, launches: ChannelLaunches) -> Prepared:
    p = launches.plan
    assert x.g is not None
    ready = empty_prepared(x.q, x.g, p)
    intervals = interval_matrices(p.chunk, p.exact, x.q.device)
    places = given(launches.chunk_places, ready.totals)
    tensors = {
        "q_ptr": x.q, "k_ptr": x.k, "g_ptr": x.g, "intervals_ptr": intervals, "scores_ptr": ready.scores,
        "from_start_ptr": ready.from_start, "to_end_ptr": ready.to_end, "totals_ptr": ready.totals,
        "unbounded_ptr": ready.unbounded, "places_ptr": places,
    }  # fmt: skip
    if launches.bounded:
        launches.bounded_prepare(**tensors)
    launches.prepare(**tensors)
    return ready


def outputs(
    x: Inputs,
    launches: ChannelLaunches,
    totals: ChannelSegments,
    ready: Prepared,
    o: Tensor,
    leaving: Tensor,
    state_in: Tensor | None,
) -> None:
    states, before = given(totals.states, leaving), given(totals.decays, leaving)
    launches.output(
        q_ptr=ready.from_start,
        k_ptr=ready.to_end,
        v_ptr=x.v,
        totals_ptr=ready.totals,
        scores_ptr=ready.scores,
        o_ptr=o,
        states_ptr=states,
        before_ptr=before,
        state_out_ptr=leaving,
        places_ptr=given(launches.places, leaving),
        state_in_ptr=state_in,
    )


def local_gradients(x: Inputs, launches: ChannelLaunches, ready: Prepared, entering: Tensor, d_o: Tensor) -> QueryReads:
    read_q = x.q.new_empty(launches.reads, dtype=read_dtype(x.q.dtype))
    B, _, H_v, K = launches.reads
    sums = ready.totals.new_empty(B, H_v, launches.plan.chunks, K)
    inner = sums.new_empty(launches.inner, dtype=launches.inner_dtype)
    launches.query_inter_chunk(
        from_start_ptr=ready.from_start,
        to_end_ptr=ready.to_end,
        v_ptr=x.v,
        do_ptr=d_o,
        totals_ptr=ready.totals,
        read_q_ptr=read_q,
        sums_ptr=sums,
        inner_ptr=inner,
        states_ptr=entering,
        places_ptr=given(launches.places, sums),
    )
    return QueryReads(read_q, sums, inner)


def gradients(
    x: Inputs,
    launches: ChannelLaunches,
    entering: Tensor,
    leaving: Tensor,
    adjoint: ChannelSegments,
    local: QueryReads,
    d_o: Tensor,
    d_state_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq and dk per head of gates; dv; dg."""
    p, ready = launches.plan, adjoint.prepared
    assert ready is not None
    d_states, after = given(adjoint.states, leaving), given(adjoint.decays, leaving)
    places = given(launches.places, d_states)
    read_k, k_sums = torch.empty_like(local.read_q), torch.empty_like(local.sums)
    launches.key_inter_chunk(
        from_start_ptr=ready.from_start,
        to_end_ptr=ready.to_end,
        v_ptr=x.v,
        do_ptr=d_o,
        totals_ptr=ready.totals,
        read_k_ptr=read_k,
        sums_ptr=k_sums,
        inner_ptr=local.inner,
        d_states_ptr=d_states,
        after_ptr=after,
        places_ptr=places,
        d_state_out_ptr=d_state_out,
    )
    through = local.sums  # in their place
    launches.through(
        totals_ptr=ready.totals,
        k_sums_ptr=k_sums,
        inner_ptr=local.inner,
        state_out_ptr=leaving,
        through_ptr=through,
        places_ptr=places,
        d_state_out_ptr=d_state_out,
    )
    assert x.g is not None
    dq = launches.new_gradient(x.q)
    dk, dg = torch.empty_like(dq), torch.empty_like(x.g)
    intervals = interval_matrices(p.chunk, p.exact, x.q.device)
    operands = {
        "q_ptr": x.q, "k_ptr": x.k, "v_ptr": x.v, "do_ptr": d_o, "g_ptr": x.g, "intervals_ptr": intervals,
        "unbounded_ptr": ready.unbounded, "read_q_ptr": local.read_q, "read_k_ptr": read_k, "through_ptr": through,
        "dq_ptr": dq, "dk_ptr": dk, "dg_ptr": dg, "places_ptr": given(launches.chunk_places, through),
    }  # fmt: skip
    if launches.bounded:
        launches.bounded_intra_chunk(**operands)
    launches.intra_chunk(**operands)
    dv = torch.empty_like(x.v)
    launches.value_gradient(
        q_ptr=ready.from_start,
        k_ptr=ready.to_end,
        do_ptr=d_o,
        totals_ptr=ready.totals,
        scores_ptr=ready.scores,
        dv_ptr=dv,
        d_states_ptr=d_states,
        after_ptr=after,
        places_ptr=places,
        d_state_out_ptr=d_state_out,
    )
    return dq, dk, dv, dg


def read_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is read from states: it lacks their decays and may exceed fp16's range."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
