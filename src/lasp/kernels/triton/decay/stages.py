"""The decay family's stages on a GPU (contract: `lasp.recurrence.stages`).

summarize: summary of every segment, scan over segments.  outputs: sweep of o.
summarize_adjoint: summary, reversed scan.  local_gradients: sweep of dq.  gradients: sweeps of dk (and dg), dv.
What is kept for backward is one state per segment, not per chunk, with other ranks' part applied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp.algebra import Diagonal, Identity, Scalar, Summary
from lasp.kernels.triton.common.decays import TOKEN
from lasp.kernels.triton.common.launch import use_scratch
from lasp.kernels.triton.common.packing import bounds_of, chunks_of, given, places_of
from lasp.kernels.triton.decay.channel import stages as channel
from lasp.kernels.triton.decay.inputs import DecayRun, prepare
from lasp.kernels.triton.decay.launches import Launches, keeps_states, kind_of, per_channel, plan_of
from lasp.recurrence.inputs import DecayInputs
from lasp.recurrence.stages import Gradients, Saved, Stages, Unsummarized


class ScalarSegments(NamedTuple):
    """States [B, H_v, segments, K, V] at one end of each segment, and decays [B, H_v, segments] (base 2) from the run's
    end on that side to them; None where sweeps gather. gates: for a gate per token, prefix and, of fp32 inputs,
    suffix, each [B, H_v, chunks C]."""

    states: Tensor | None
    decays: Tensor | None
    gates: tuple[Tensor, ...]


class ScalarSaved(NamedTuple):
    """States entering each segment [B, H_v, segments, K, V], or None where they will be gathered again; the one leaving
    the run [B, H_v, K, V]; gates."""

    entering: Tensor | None
    leaving: Tensor
    gates: tuple[Tensor, ...]


Segments = ScalarSegments | channel.ChannelSegments


def _saved(saved: ScalarSaved | channel.ChannelSaved) -> Saved:
    """The tensors of it: first the state leaving the run."""
    others = saved.prepared if isinstance(saved, channel.ChannelSaved) else saved.gates
    return (saved.leaving, *(() if saved.entering is None else (saved.entering,)), *others)


def _scalar_saved(x: DecayRun, saved: Saved) -> ScalarSaved:
    if x.work.keeps_states:
        return ScalarSaved(saved[1], saved[0], saved[2:])
    return ScalarSaved(None, saved[0], saved[1:])


def _channel_saved(x: DecayRun, saved: Saved) -> channel.ChannelSaved:
    if x.work.keeps_states:
        return channel.ChannelSaved(saved[1], saved[0], channel.Prepared(*saved[2:]))
    return channel.ChannelSaved(None, saved[0], channel.Prepared(*saved[1:]))


def _leaving(saved: Saved) -> Tensor:
    return saved[0]


class QueryGradient(NamedTuple):
    """dq per value head [B, T, H_v, K]; where the decay's gradient is wanted, q . dq in parts
    [parts, 2, B, H_v, chunks C] and the states at the inner borders of legs [B, H_v, legs, K, V]."""

    dq: Tensor
    sums: Tensor
    inner: Tensor


Local = QueryGradient | channel.QueryReads


def summarize(x: DecayRun) -> tuple[Summary, Segments]:
    return _summarized(*_totals_of(x, x.k, x.v, None, _gate_sums(x), reverse=False, summarized=True))


def totals(x: DecayRun) -> Segments:
    """What is known of the run's segments; nothing where sweeps gather."""
    prepared = channel.local_outputs(x) if x.work.per_channel else None
    return _totals_of(x, x.k, x.v, prepared, _gate_sums(x), reverse=False, summarized=False)[1]


def summarize_adjoint(x: DecayRun, saved: Saved, d_o: Tensor) -> tuple[Summary, Segments]:
    return _summarized(*_totals_adjoint_of(x, saved, d_o, summarized=True))


def totals_adjoint(x: DecayRun, saved: Saved, d_o: Tensor) -> Segments:
    """As `totals`, of gradients."""
    return _totals_adjoint_of(x, saved, d_o, summarized=False)[1]


def _summarized(summary: Summary | None, segments: Segments) -> tuple[Summary, Segments]:
    assert summary is not None
    return summary, segments


def _totals_adjoint_of(x: DecayRun, saved: Saved, d_o: Tensor, *, summarized: bool) -> tuple[Summary | None, Segments]:
    use_scratch()  # backward passes have threads of their own
    if x.work.per_channel:
        prepared = _channel_saved(x, saved).prepared
        return _totals_of(x, x.q, d_o, prepared, (), reverse=True, summarized=summarized)
    return _totals_of(x, x.q, d_o, None, _scalar_saved(x, saved).gates, reverse=True, summarized=summarized)


def _totals_of(
    x: DecayRun,
    k: Tensor,
    v: Tensor,
    prepared: channel.Prepared | None,
    gates: tuple[Tensor, ...],
    *,
    reverse: bool,
    summarized: bool,
) -> tuple[Summary | None, Segments]:
    work = x.work
    # `Launches` keeps what was found for tensors of these dtypes.
    assert v.dtype == x.v.dtype and (x.g is None or x.g.dtype == torch.float32)
    places = places_of(work.plan, v)
    if work.plan.gathers:
        assert not summarized
        if work.per_channel:
            return None, channel.ChannelSegments(None, None, prepared)
        return None, ScalarSegments(None, None, gates)
    states = torch.empty(work.states, dtype=torch.float32, device=k.device)
    decays, before = states.new_empty(work.decays), states.new_empty(work.decays)
    if prepared is not None:
        launch = work.summary_adjoint if reverse else work.prepared_summary
        operand = prepared.from_start if reverse else prepared.to_end
        launch(operand, v, prepared.totals, states, decays, places)
    elif work.per_channel:
        work.summary(k, v, x.g, states, decays, places)
    else:
        launch = work.summary_adjoint if reverse else work.summary
        launch(k, v, k if x.g is None else x.g, states, decays, *_two(gates, before), places)

    total = total_decay = None
    if summarized:
        total, total_decay = states.new_empty(work.state), states.new_empty(work.total_decay)
    scan = work.scan_adjoint if reverse else work.scan
    scan(states, decays, before, bounds_of(work.plan, states), total_decay, total)
    if work.per_channel:
        segments: Segments = channel.ChannelSegments(states, before, prepared)
    else:
        segments = ScalarSegments(states, before, gates)
    if total is None or total_decay is None:
        return None, segments
    transition = Identity() if x.g is None else Diagonal(total_decay) if work.per_channel else Scalar(total_decay)
    return Summary(transition, total), segments


def _gate_sums(x: DecayRun) -> tuple[Tensor, ...]:
    work = x.work
    if not work.per_token:
        return ()
    gates = tuple(x.v.new_empty(work.gates, dtype=torch.float32) for _ in range(work.plan.num_gates))
    work.gate_sums(x.g, *_two(gates, gates[0]), chunks_of(work.plan, gates[0]))
    return gates


def local_outputs(x: DecayRun, totals: Segments) -> channel.Prepared | None:
    if not isinstance(totals, channel.ChannelSegments):
        return None
    return channel.local_outputs(x) if totals.prepared is None else totals.prepared


def outputs(
    x: DecayRun, totals: Segments, partial: channel.Prepared | None, state_in: Tensor | None
) -> tuple[Tensor, Saved]:
    """state_in is zero if None."""
    work = x.work
    state_in = None if state_in is None else state_in.contiguous()
    o, leaving = torch.empty_like(x.v), torch.empty(work.state, dtype=torch.float32, device=x.v.device)
    places = places_of(work.plan, leaving)
    if isinstance(totals, channel.ChannelSegments):
        assert partial is not None
        saved = _saved(channel.outputs(x, totals, partial, o, leaving, state_in))
    else:
        states, decays, gates = totals
        if states is None and work.keeps_states:
            states = leaving.new_empty(work.states)
        g, unread = x.q if x.g is None else x.g, leaving
        work.output(
            x.q, x.k, x.v, g, *_two(gates, unread), o, given(states, unread), given(decays, unread), leaving, places,
            state_in,
        )  # fmt: skip
        saved = _saved(ScalarSaved(states, leaving, gates))
    if x.v.numel() == 0:  # no kernel ran
        leaving.zero_() if state_in is None else leaving.copy_(state_in)
    return o, saved


def local_gradients(x: DecayRun, saved: Saved, totals_adjoint: Segments, d_o: Tensor) -> Local:
    work = x.work
    if work.per_channel:
        return channel.local_gradients(x, _channel_saved(x, saved), d_o)
    kept = _scalar_saved(x, saved)
    dq = x.q.new_empty(work.gradient, dtype=work.gradient_dtype)
    unread = kept.leaving
    sums = unread.new_empty(work.sums) if work.with_decay else unread
    inner = _inner_states(work, unread)
    g = x.q if x.g is None else x.g
    gates, entering = _two(kept.gates, unread), given(kept.entering, unread)
    work.query_gradient(x.q, x.k, x.v, d_o, g, *gates, dq, sums, inner, entering, places_of(work.plan, dq))
    return QueryGradient(dq, sums, inner)


def gradients(
    x: DecayRun, saved: Saved, totals_adjoint: Segments, local: Local, d_o: Tensor, d_state_out: Tensor | None
) -> Gradients:
    """d_state_out is zero if None."""
    d_state_out = None if d_state_out is None else d_state_out.contiguous()
    if isinstance(totals_adjoint, channel.ChannelSegments):
        assert isinstance(local, channel.QueryReads)
        kept = _channel_saved(x, saved)
        dq, dk, dv, d_gate = channel.gradients(x, kept, totals_adjoint, local, d_o, d_state_out)
        return _sum_groups(x, dq), _sum_groups(x, dk), dv, d_gate
    assert isinstance(local, QueryGradient)
    return _scalar_gradients(x, _scalar_saved(x, saved), totals_adjoint, local, d_o, d_state_out)


def _scalar_gradients(
    x: DecayRun,
    saved: ScalarSaved,
    totals_adjoint: ScalarSegments,
    local: QueryGradient,
    d_o: Tensor,
    d_state_out: Tensor | None,
) -> Gradients:
    work = x.work
    unread = saved.leaving
    g, gates = x.q if x.g is None else x.g, _two(saved.gates, unread)
    d_states, after = given(totals_adjoint.states, unread), given(totals_adjoint.decays, unread)
    places = places_of(work.plan, d_states)

    dk, dv = torch.empty_like(local.dq), torch.empty_like(x.v)
    if work.paired:
        work.key_value_gradient(x.q, x.k, x.v, d_o, g, *gates, dk, dv, d_states, after, places, d_state_out)
        return local.dq, dk, dv, None
    # First: the sweep of dk may add d_state_out to d_states.
    work.value_gradient(x.q, x.k, d_o, g, *gates, dv, d_states, after, places, d_state_out)
    sums, inner, d_state_in = unread, _inner_states(work, unread), unread
    if work.with_decay:
        sums = unread.new_empty(work.sums)
        if not work.from_zero:
            d_state_in = unread.new_empty(work.state)
        if totals_adjoint.states is None and work.keeps_states:
            d_states = unread.new_empty(work.states)
    work.key_gradient(x.q, x.k, x.v, d_o, g, *gates, dk, sums, inner, d_state_in, d_states, after, places, d_state_out)
    d_gate = None
    if work.with_decay:
        d_gate = unread.new_empty(x.v.shape[:3])
        work.gate_gradient(
            x.q, x.k, x.v, d_o, g, gates[0], local.sums, sums, given(saved.entering, unread), local.inner,
            saved.leaving, d_states, inner, d_state_in, d_gate, places, d_state_out,
        )  # fmt: skip
        if g.dim() == 1:
            d_gate = d_gate.sum((0, 1))
    return _sum_groups(x, local.dq), _sum_groups(x, dk), dv, d_gate


def _inner_states(work: Launches, unread: Tensor) -> Tensor:
    """For what the sweeps of dq and dk leave within segments, where they do."""
    return unread.new_empty(work.inner) if work.with_decay and work.inner is not None else unread


def _two(gates: tuple[Tensor, ...], unread: Tensor) -> tuple[Tensor, ...]:
    """prefix and suffix; `unread` for what there is not."""
    return (*gates, unread, unread)[:2]


def _sum_groups(x: DecayRun, gradient: Tensor) -> Tensor:
    """[B, T, H_v, K] -> [B, T, H, K]."""
    heads = x.q.shape[2]
    if gradient.shape[2] == heads:
        return gradient
    return gradient.unflatten(2, (heads, -1)).sum(3).to(x.q.dtype)


def empty_saved(x: DecayInputs, alone: bool, want_gate: bool) -> list[Tensor]:
    """Tensors of the shapes and dtypes that `outputs` saves; want_gate: the gradient of g will be wanted."""
    q, v, g = x.q, x.v, x.g
    (B, _, H_v, V), K, p = v.shape, q.shape[3], plan_of(q, v, g, alone)

    def state(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    results = [state(B, H_v, K, V)]
    if keeps_states(p, want_gate):
        results.append(state(B, H_v, p.segments, K, V))
    if per_channel(g):
        return [*results, *channel.empty_prepared(q, v, p)]
    if kind_of(g) == TOKEN.value:
        return [*results, *(state(B, H_v, p.chunks * p.chunk) for _ in range(p.num_gates))]
    return results


STAGES = Stages(
    prepare=prepare,
    summarize=summarize,
    local_outputs=local_outputs,
    outputs=outputs,
    summarize_adjoint=summarize_adjoint,
    local_gradients=local_gradients,
    gradients=gradients,
    unsummarized=Unsummarized(totals, totals_adjoint, _leaving),
    empty_saved=empty_saved,
    grouped_heads=True,
    takes_no_state=True,
    reads_queries_late=True,
    bad_gates_give_nan=True,
)
