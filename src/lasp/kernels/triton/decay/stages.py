"""The decay family's stages on a GPU (contract: `lasp.recurrence.stages`).

summarize: summary of every segment, scan over segments.  outputs: sweep of o.
summarize_adjoint: summary, reversed scan.  local_gradients: sweep of dq.  gradients: sweeps of dk (and dg), dv.
What is kept for backward is one state per segment, not per chunk, with other ranks' part applied.

Each stage prepares its inputs and calls the function of the same work on prepared ones (`*_of`). `operators` calls
those directly, on one device and over ranks. The stages themselves are for tests and benchmarks, which run one at a
time and put runs together as ranks would, without an exchange.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.algebra import Diagonal, Identity, Scalar, Summary
from lasp.kernels.triton.common.launch import use_scratch
from lasp.kernels.triton.common.packing import bounds_of, chunks_of, given, places_of
from lasp.kernels.triton.decay.channel import stages as channel
from lasp.kernels.triton.decay.launches import Launches, work_of
from lasp.recurrence.stages import DecayInputs

GROUPED_HEADS = True
BAD_GATES_GIVE_NAN = True


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


def saved_list(saved: Any) -> list[Tensor]:
    """What an operator gives back of `saved`, or takes: first the state leaving the run."""
    others = saved.prepared if isinstance(saved, channel.ChannelSaved) else saved.gates
    return [saved.leaving, *([] if saved.entering is None else [saved.entering]), *others]


def saved_of(work: Launches, tensors: list[Tensor]) -> Any:
    """The inverse of `saved_list`."""
    leaving, *others = tensors
    entering = others.pop(0) if work.keeps_states else None
    if work.per_channel:
        return channel.ChannelSaved(entering, leaving, channel.Prepared(*others))
    return ScalarSaved(entering, leaving, tuple(others))


class QueryGradient(NamedTuple):
    """dq per value head [B, T, H_v, K]; where the decay's gradient is wanted, q . dq in parts
    [parts, 2, B, H_v, chunks C] and the states at the inner borders of legs [B, H_v, legs, K, V]."""

    dq: Tensor
    sums: Tensor
    inner: Tensor


def prepare(x: DecayInputs, from_zero: bool = False) -> tuple[DecayInputs, Launches]:
    """x with dense tensors, and the work on it.

    from_zero: x is the whole sequence and starts from no state.

    Raises:
        ValueError: the kernels do not take such tensors.
    """
    work = work_of(x, from_zero)
    use_scratch()
    if not (
        x.q.is_contiguous() and x.k.is_contiguous() and x.v.is_contiguous() and (x.g is None or x.g.is_contiguous())
    ):
        g = None if x.g is None else x.g.contiguous()
        x = x._replace(q=x.q.contiguous(), k=x.k.contiguous(), v=x.v.contiguous(), g=g)
    return x, work


def totals_of(x: DecayInputs, work: Launches, prepared: Any = None, *, summarized: bool) -> tuple[Summary | None, Any]:
    """What is known of the run's segments, and its summary if that is wanted; nothing where sweeps gather.

    prepared: what `local_outputs_of` made, where it did so before.
    """
    gates = _gate_sums(x, work)
    return _totals_of(x, work, x.k, x.v, prepared, gates, reverse=False, summarized=summarized)


def totals_adjoint_of(
    x: DecayInputs, work: Launches, saved: Any, d_o: Tensor, *, summarized: bool
) -> tuple[Summary | None, Any]:
    """Likewise of gradients."""
    prepared, gates = (saved.prepared, ()) if work.per_channel else (None, saved.gates)
    return _totals_of(x, work, x.q, d_o, prepared, gates, reverse=True, summarized=summarized)


def _totals_of(
    x: DecayInputs,
    work: Launches,
    k: Tensor,
    v: Tensor,
    prepared: channel.Prepared | None,
    gates: tuple[Tensor, ...],
    *,
    reverse: bool,
    summarized: bool,
) -> tuple[Summary | None, Any]:
    # `Launches` keeps what was found for tensors of these dtypes.
    assert v.dtype == x.v.dtype and (x.g is None or x.g.dtype == torch.float32)
    places = places_of(work.plan, v)
    if work.plan.gathers:
        assert not summarized
        if work.per_channel:
            return None, channel.ChannelSegments(None, None)
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
    totals = channel.ChannelSegments(states, before) if work.per_channel else ScalarSegments(states, before, gates)
    if total is None or total_decay is None:
        return None, totals
    transition = Identity() if x.g is None else Diagonal(total_decay) if work.per_channel else Scalar(total_decay)
    return Summary(transition, total), totals


def _gate_sums(x: DecayInputs, work: Launches) -> tuple[Tensor, ...]:
    if not work.per_token:
        return ()
    gates = tuple(x.v.new_empty(work.gates, dtype=torch.float32) for _ in range(work.plan.num_gates))
    work.gate_sums(x.g, *_two(gates, gates[0]), chunks_of(work.plan, gates[0]))
    return gates


def summarize(x: DecayInputs) -> tuple[Summary, Any]:
    x, work = prepare(x)
    return _summarized(*totals_of(x, work, summarized=True))


def _summarized(summary: Summary | None, totals: Any) -> tuple[Summary, Any]:
    assert summary is not None
    return summary, totals


def local_outputs(x: DecayInputs, totals: Any) -> Any:
    return local_outputs_of(*prepare(x))


def local_outputs_of(x: DecayInputs, work: Launches) -> Any:
    return channel.local_outputs(x, work) if work.per_channel else None


def outputs(x: DecayInputs, totals: Any, partial: Any, state_in: Tensor) -> tuple[Tensor, Any]:
    return outputs_of(*prepare(x), totals, partial, state_in.contiguous())


def outputs_of(
    x: DecayInputs, work: Launches, totals: Any, partial: Any, state_in: Tensor | None
) -> tuple[Tensor, Any]:
    """state_in is zero if None."""
    o, leaving = torch.empty_like(x.v), torch.empty(work.state, dtype=torch.float32, device=x.v.device)
    places = places_of(work.plan, leaving)
    if work.per_channel:
        return channel.outputs(x, work, totals, partial, o, leaving, state_in)
    states, decays, gates = totals
    if states is None and work.keeps_states:
        states = leaving.new_empty(work.states)
    g, unread = x.q if x.g is None else x.g, leaving
    work.output(
        x.q, x.k, x.v, g, *_two(gates, unread), o, given(states, unread), given(decays, unread), leaving, places,
        state_in,
    )  # fmt: skip
    return o, ScalarSaved(states, leaving, gates)


def summarize_adjoint(x: DecayInputs, saved: Any, d_o: Tensor) -> tuple[Summary, Any]:
    x, work = prepare(x)
    return _summarized(*totals_adjoint_of(x, work, saved, d_o.contiguous(), summarized=True))


def local_gradients(x: DecayInputs, saved: Any, totals_adjoint: Any, d_o: Tensor) -> Any:
    return local_gradients_of(*prepare(x), saved, d_o.contiguous())


def local_gradients_of(x: DecayInputs, work: Launches, saved: Any, d_o: Tensor) -> Any:
    if work.per_channel:
        return channel.local_gradients(x, work, saved, d_o)
    dq = x.q.new_empty(work.gradient, dtype=work.gradient_dtype)
    unread = saved.leaving
    sums = unread.new_empty(work.sums) if work.with_decay else unread
    inner = _inner_states(work, unread)
    g = x.q if x.g is None else x.g
    gates, entering = _two(saved.gates, unread), given(saved.entering, unread)
    work.query_gradient(x.q, x.k, x.v, d_o, g, *gates, dq, sums, inner, entering, places_of(work.plan, dq))
    return QueryGradient(dq, sums, inner)


def gradients(
    x: DecayInputs, saved: Any, totals_adjoint: Any, local: Any, d_o: Tensor, d_state_out: Tensor
) -> tuple[Tensor | None, ...]:
    return gradients_of(*prepare(x), saved, totals_adjoint, local, d_o.contiguous(), d_state_out.contiguous())


def gradients_of(
    x: DecayInputs,
    work: Launches,
    saved: Any,
    totals_adjoint: Any,
    local: Any,
    d_o: Tensor,
    d_state_out: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """d_state_out is zero if None."""
    if work.per_channel:
        dq, dk, dv, d_gate = channel.gradients(x, work, saved, totals_adjoint, local, d_o, d_state_out)
        return _sum_groups(x, dq), _sum_groups(x, dk), dv, d_gate
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


def _sum_groups(x: DecayInputs, gradient: Tensor) -> Tensor:
    """[B, T, H_v, K] -> [B, T, H, K]."""
    heads = x.q.shape[2]
    if gradient.shape[2] == heads:
        return gradient
    return gradient.unflatten(2, (heads, -1)).sum(3).to(x.q.dtype)
