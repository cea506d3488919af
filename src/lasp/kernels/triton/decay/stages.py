"""The decay family's stages on a GPU (contract: `lasp.recurrence.stages`), of either kind of decay.

summarize: summary of every segment, scan over segments.  outputs: sweep of o.
summarize_adjoint: summary, reversed scan.  local_gradients: sweep of dq.  gradients: sweeps of dk (and dg), dv.
What is kept for backward is one state per segment, not per chunk, with other ranks' part applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lasp.algebra import Diagonal, Identity, Scalar, Summary
from lasp.kernels.triton.common.launch import given
from lasp.kernels.triton.decay import runs
from lasp.kernels.triton.decay.channel import stages as channel
from lasp.kernels.triton.decay.channel.launches import ChannelLaunches
from lasp.kernels.triton.decay.launches import RunShape, SegmentSums
from lasp.kernels.triton.decay.plan import CHANNEL, KINDS, TOKEN, keeps_states
from lasp.kernels.triton.decay.scalar import stages as scalar
from lasp.kernels.triton.decay.scalar.grouped import stages as grouped
from lasp.kernels.triton.decay.scalar.grouped.launches import GroupedLaunches
from lasp.recurrence.documents import Documents
from lasp.recurrence.inputs import DecayInputs
from lasp.recurrence.stages import Gradients, Saved, Stages, Unsummarized

Segments: TypeAlias = scalar.ScalarSegments | channel.ChannelSegments
Local: TypeAlias = scalar.QueryGradient | channel.QueryReads | Tensor


class DecayRun(NamedTuple):
    """Contiguous inputs, as in `DecayInputs`, and the launches that runs of their shapes take."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    scale: float
    documents: Documents | None
    launches: runs.Launches
    log_weight: Tensor | None = None
    skip: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4] if self.log_weight is None else (*self[:4], *self[-2:])

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> DecayRun:
        return DecayRun(*tensors[:4], *self[4:-2], *tensors[4:])  # type: ignore[arg-type, call-arg]


def prepare(x: DecayInputs, alone: bool) -> DecayRun:
    """x with dense tensors, and the launches for it.

    alone: x is the whole sequence and starts from no state.

    Raises:
        ValueError: the kernels do not take such tensors.
    """
    q, k, v, g, scale, documents, log_weight, skip = x
    shape = _shape(x, g is not None and g.requires_grad, alone)
    if documents is None:
        launches = runs.launches_of(shape, q.device)
    else:
        launches = runs.packed_launches_of(shape, documents, q.device)
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and (g is None or g.is_contiguous())):
        q, k, v, g = q.contiguous(), k.contiguous(), v.contiguous(), None if g is None else g.contiguous()
    if log_weight is not None and skip is not None:
        log_weight, skip = log_weight.contiguous(), skip.contiguous()
    return DecayRun(q, k, v, g, scale, documents, launches, log_weight, skip)


def _shape(x: DecayInputs, with_decay: bool, from_zero: bool) -> RunShape:
    kind = KINDS[0 if x.g is None else x.g.dim()]
    gate_heads = x.g.shape[2] if x.g is not None and kind == CHANNEL else 0
    # Weights' gradients come with the decay's.
    weighs = x.log_weight is not None
    return RunShape(x.q.shape, x.v.shape, x.q.dtype, kind, with_decay or weighs, x.scale, from_zero, gate_heads, weighs)


def _leaving(saved: Saved) -> Tensor:
    return saved[0]


def _entering(x: DecayRun, saved: Saved) -> Tensor:
    """States entering each segment [B, H_v, segments, K, V], or any tensor where they will be gathered again."""
    return saved[1] if x.launches.keeps_states else saved[0]


def summarize(x: DecayRun) -> tuple[Summary, Segments]:
    return _summarized(*_totals(x, None, summarized=True))


def totals(x: DecayRun) -> Segments:
    """Totals of the run's segments; none where sweeps gather."""
    launches = x.launches
    prepared = channel.local_outputs(x, launches) if isinstance(launches, ChannelLaunches) else None
    return _totals(x, prepared, summarized=False)[1]


def _totals(x: DecayRun, prepared: channel.Prepared | None, *, summarized: bool) -> tuple[Summary | None, Segments]:
    launches, gathers = x.launches, x.launches.plan.gathers
    assert x.g is None or x.g.dtype == torch.float32  # launches keep what was found for tensors of these dtypes
    if isinstance(launches, ChannelLaunches):
        if gathers:
            return None, channel.ChannelSegments(None, None, prepared)
        sums = _new_sums(x)
        channel.summarize(x, launches, sums, prepared, x.v, reverse=False)
        summary, before = _scanned(x, sums, reverse=False, summarized=summarized)
        return summary, channel.ChannelSegments(sums[0], before, prepared)
    gates = scalar.gate_sums(x, launches)
    if gathers:
        return None, scalar.ScalarSegments(None, None, gates)
    sums = _new_sums(x)
    _summarize(x, launches, sums, x.k, x.v, gates, reverse=False)
    summary, before = _scanned(x, sums, reverse=False, summarized=summarized)
    return summary, scalar.ScalarSegments(sums[0], before, gates)


def summarize_adjoint(x: DecayRun, saved: Saved, d_o: Tensor) -> tuple[Summary, Segments]:
    return _summarized(*_totals_adjoint(x, saved, d_o, summarized=True))


def totals_adjoint(x: DecayRun, saved: Saved, d_o: Tensor) -> Segments:
    """Totals of the gradients of the run's segments; none where sweeps gather."""
    return _totals_adjoint(x, saved, d_o, summarized=False)[1]


def _totals_adjoint(x: DecayRun, saved: Saved, d_o: Tensor, *, summarized: bool) -> tuple[Summary | None, Segments]:
    assert d_o.dtype == x.v.dtype
    launches, gathers = x.launches, x.launches.plan.gathers
    others = saved[2:] if launches.keeps_states else saved[1:]
    if isinstance(launches, ChannelLaunches):
        prepared = channel.Prepared(*others)
        if gathers:
            return None, channel.ChannelSegments(None, None, prepared)
        sums = _new_sums(x)
        channel.summarize(x, launches, sums, prepared, d_o, reverse=True)
        summary, after = _scanned(x, sums, reverse=True, summarized=summarized)
        return summary, channel.ChannelSegments(sums[0], after, prepared)
    if gathers:
        return None, scalar.ScalarSegments(None, None, others)
    sums = _new_sums(x)
    _summarize(x, launches, sums, x.q, d_o, others, reverse=True)
    summary, after = _scanned(x, sums, reverse=True, summarized=summarized)
    return summary, scalar.ScalarSegments(sums[0], after, others)


def _summarize(
    x: DecayRun,
    launches: scalar.ScalarLaunches,
    sums: SegmentSums,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, ...],
    *,
    reverse: bool,
) -> None:
    if isinstance(launches, GroupedLaunches):
        grouped.summarize(x, launches, sums, k, v, gates, reverse=reverse)
    else:
        scalar.summarize(x, launches, sums, k, v, gates, reverse=reverse)


def _summarized(summary: Summary | None, segments: Segments) -> tuple[Summary, Segments]:
    assert summary is not None
    return summary, segments


def _new_sums(x: DecayRun) -> SegmentSums:
    states = x.v.new_empty(x.launches.states, dtype=torch.float32)
    return states, states.new_empty(x.launches.decays)


def _scanned(x: DecayRun, sums: SegmentSums, *, reverse: bool, summarized: bool) -> tuple[Summary | None, Tensor]:
    """Replace the segments' states by those at their starts (reverse: ends), from zero.

    Returns:
        The run's summary if it is wanted; the decays from the run's end on that side to the segments.
    """
    launches, (states, decays) = x.launches, sums
    before = states.new_empty(launches.decays)
    total = states.new_empty(launches.state) if summarized else None
    total_decay = states.new_empty(launches.total_decay) if summarized else None
    scan = launches.scan_adjoint if reverse else launches.scan
    scan(
        states_ptr=states,
        decays_ptr=decays,
        before_ptr=before,
        bounds_ptr=given(launches.bounds, states),
        total_decay_ptr=total_decay,
        total_ptr=total,
    )
    if total is None or total_decay is None:
        return None, before
    if x.g is None:
        return Summary(Identity(), total), before
    per_channel = isinstance(launches, ChannelLaunches)
    return Summary(Diagonal(total_decay) if per_channel else Scalar(total_decay), total), before


def local_outputs(x: DecayRun, totals: Segments) -> channel.Prepared | None:
    launches = x.launches
    if not isinstance(totals, channel.ChannelSegments):
        return None
    assert isinstance(launches, ChannelLaunches)
    return channel.local_outputs(x, launches) if totals.prepared is None else totals.prepared


def outputs(
    x: DecayRun, totals: Segments, partial: channel.Prepared | None, state_in: Tensor | None
) -> tuple[Tensor, Saved]:
    """state_in is zero if None. saved: the state leaving the run [B, H_v, K, V]; those entering segments, if they are
    kept; gates, or what was prepared per chunk."""
    launches = x.launches
    state_in = None if state_in is None else state_in.contiguous()
    o, leaving = torch.empty_like(x.v), x.v.new_empty(launches.state, dtype=torch.float32)
    if isinstance(launches, ChannelLaunches):
        assert partial is not None and isinstance(totals, channel.ChannelSegments)
        channel.outputs(x, launches, totals, partial, o, leaving, state_in)
        states, others = totals.states, tuple(partial)
    else:
        assert isinstance(totals, scalar.ScalarSegments)
        if isinstance(launches, GroupedLaunches) and launches.own:
            states = grouped.outputs(x, launches, totals, o, leaving, state_in)
        else:
            states = scalar.outputs(x, launches, totals, o, leaving, state_in)
        others = totals.gates
    if x.v.numel() == 0:  # no kernel ran
        leaving.zero_() if state_in is None else leaving.copy_(state_in)
    return o, (leaving, *others) if states is None else (leaving, states, *others)


def local_gradients(x: DecayRun, saved: Saved, totals_adjoint: Segments, d_o: Tensor) -> Local:
    launches, entering = x.launches, _entering(x, saved)
    if isinstance(launches, ChannelLaunches):
        assert isinstance(totals_adjoint, channel.ChannelSegments) and totals_adjoint.prepared is not None
        return channel.local_gradients(x, launches, totals_adjoint.prepared, entering, d_o)
    assert isinstance(totals_adjoint, scalar.ScalarSegments)
    if isinstance(launches, GroupedLaunches):
        return grouped.block_states(x, launches, totals_adjoint.gates, entering)
    return scalar.local_gradients(x, launches, totals_adjoint.gates, entering, saved[0], d_o)


def gradients(
    x: DecayRun, saved: Saved, totals_adjoint: Segments, local: Local, d_o: Tensor, d_state_out: Tensor | None
) -> Gradients:
    """d_state_out is zero if None."""
    launches, entering, leaving = x.launches, _entering(x, saved), saved[0]
    d_state_out = None if d_state_out is None else d_state_out.contiguous()
    found: Gradients
    if isinstance(launches, GroupedLaunches):
        assert isinstance(local, Tensor) and isinstance(totals_adjoint, scalar.ScalarSegments)
        return grouped.gradients(x, launches, totals_adjoint, local, d_o, d_state_out)
    if isinstance(launches, ChannelLaunches):
        assert isinstance(local, channel.QueryReads) and isinstance(totals_adjoint, channel.ChannelSegments)
        found = channel.gradients(x, launches, entering, leaving, totals_adjoint, local, d_o, d_state_out)
    else:
        assert isinstance(local, scalar.QueryGradient) and isinstance(totals_adjoint, scalar.ScalarSegments)
        found = scalar.gradients(x, launches, entering, leaving, totals_adjoint, local, d_o, d_state_out)
    dq, dk, *others = found
    assert dq is not None and dk is not None
    return _sum_groups(x, dq), _sum_groups(x, dk), *others


def _sum_groups(x: DecayRun, gradient: Tensor) -> Tensor:
    """[B, T, H_v, K] (of gates per channel [B, T, H_g, K]) -> [B, T, H, K]."""
    heads = x.q.shape[2]
    if gradient.shape[2] == heads:
        return gradient
    parts = gradient.unflatten(2, (heads, -1))
    # PyTorch's sum over so few, not the last dim, takes three times as long.
    total = parts[:, :, :, 0] + parts[:, :, :, 1] if parts.shape[3] == 2 else parts.sum(3)
    return total.to(x.q.dtype)


def empty_saved(x: DecayInputs, from_state: bool, over_ranks: bool, want_gate: bool) -> list[Tensor]:
    """Tensors of the shapes and dtypes that `outputs` saves; want_gate: the gradient of g will be wanted."""
    shape = _shape(x, want_gate, not (from_state or over_ranks))
    (B, _, H_v, V), K, p = shape.v, shape.q[3], runs.plan_of(shape, x.q.device)

    def state(*size: int) -> Tensor:
        return x.q.new_empty(size, dtype=torch.float32)

    results = [state(B, H_v, K, V)]
    if keeps_states(p, shape.with_decay):
        results.append(state(B, H_v, p.segments, K, V))
    if shape.kind == CHANNEL:
        assert x.g is not None
        return [*results, *channel.empty_prepared(x.q, x.g, p)]
    if shape.kind == TOKEN:
        return [*results, *(state(B, H_v, p.chunks * p.chunk) for _ in range(p.num_gates(shape.weighs)))]
    return results


def weighs(x: DecayInputs) -> bool:
    return x.g is not None and x.g.dim() == 3 and x.v.dtype in (torch.bfloat16, torch.float16)


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
    most_saved=7,
    grouped_heads=True,
    takes_no_state=True,
    reads_queries_late=True,
    bad_values_give_nan=True,
    weighs=weighs,
    multiplies=False,
)
