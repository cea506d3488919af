"""The stages for decays that all channels of a head share; `stages` gives the same names for every kind of decay."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lasp.kernels.triton.common.launch import given
from lasp.kernels.triton.decay.launches import SegmentSums
from lasp.kernels.triton.decay.scalar.launches import ScalarLaunches
from lasp.recurrence.inputs import Inputs
from lasp.recurrence.stages import Gradients


class ScalarRun(Inputs, Protocol):
    """A run's inputs, see `DecayInputs`."""

    @property
    def log_weight(self) -> Tensor | None: ...
    @property
    def skip(self) -> Tensor | None: ...


class ScalarSegments(NamedTuple):
    """States [B, H_v, segments, K, V] at one end of each segment, and decays [B, H_v, segments] (base 2) from the run's
    end on that side to them; None where sweeps gather. gates: for a gate per token, prefix and, of fp32 inputs, suffix
    or, where tokens have weights, added, each [B, H_v, chunks C]."""

    states: Tensor | None
    decays: Tensor | None
    gates: tuple[Tensor, ...]


class QueryGradient(NamedTuple):
    """dq per value head [B, T, H_v, K]; where the decay's gradient is wanted, q . dq in parts
    [parts, 2, B, H_v, chunks C] and the states before intervals (`DecayLaunches.inner`); where tokens have weights,
    sums of do . v (`ScalarLaunches.skipped`)."""

    dq: Tensor
    sums: Tensor
    inner: Tensor
    skipped: Tensor


def gate_sums(x: ScalarRun, launches: ScalarLaunches) -> tuple[Tensor, ...]:
    if not launches.per_token:
        return ()
    assert x.g is not None
    gates = tuple(x.g.new_empty(launches.gates) for _ in range(launches.num_gates))
    g, prefix, suffix = gate_operands(x, gates, gates[0])
    places = given(launches.chunk_places, prefix)
    launches.gate_sums(g_ptr=g, prefix_ptr=prefix, suffix_ptr=suffix, places_ptr=places, weight_ptr=x.log_weight)
    return gates


def gate_operands(x: ScalarRun, sums: tuple[Tensor, ...], unread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decay, and its prefix and suffix sums of a gate per token; `unread` for what there is not."""
    g = x.q if x.g is None else x.g
    return (g, unread, unread) if not sums else (g, sums[0], sums[-1])


def summarize(
    x: ScalarRun,
    launches: ScalarLaunches,
    sums: SegmentSums,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, ...],
    *,
    reverse: bool,
) -> None:
    """Write the sums of every segment; reverse: with q and the gradient of outputs in the places of k and v."""
    states, decays = sums
    launch = launches.summary_adjoint if reverse else launches.summary
    g, prefix, suffix = gate_operands(x, gates, states)
    launch(
        k_ptr=k,
        v_ptr=v,
        g_ptr=g,
        prefix_ptr=prefix,
        suffix_ptr=suffix,
        totals_ptr=states,
        decays_ptr=decays,
        places_ptr=given(launches.places, states),
    )


def outputs(
    x: ScalarRun,
    launches: ScalarLaunches,
    totals: ScalarSegments,
    o: Tensor,
    leaving: Tensor,
    state_in: Tensor | None,
) -> Tensor | None:
    """The states entering segments, where they are kept."""
    states, decays, gates = totals
    if states is None and launches.keeps_states:
        states = leaving.new_empty(launches.states)
    g, prefix, suffix = gate_operands(x, gates, leaving)
    launches.output(
        q_ptr=x.q,
        k_ptr=x.k,
        v_ptr=x.v,
        g_ptr=g,
        prefix_ptr=prefix,
        suffix_ptr=suffix,
        o_ptr=o,
        states_ptr=given(states, leaving),
        before_ptr=given(decays, leaving),
        state_out_ptr=leaving,
        skip_ptr=given(x.skip, leaving),
        places_ptr=given(launches.places, leaving),
        state_in_ptr=state_in,
    )
    return states


def local_gradients(
    x: ScalarRun, launches: ScalarLaunches, gates: tuple[Tensor, ...], entering: Tensor, unread: Tensor, d_o: Tensor
) -> QueryGradient:
    dq = launches.new_gradient(x.q)
    sums = unread.new_empty(launches.sums) if launches.with_decay else unread
    inner = unread
    if launches.with_decay:
        inner = unread.new_empty(launches.inner, dtype=launches.inner_dtype)
    skipped = unread.new_empty(launches.skipped) if launches.weighs else unread
    g, prefix, suffix = gate_operands(x, gates, unread)
    launches.query_gradient(
        q_ptr=x.q,
        k_ptr=x.k,
        v_ptr=x.v,
        do_ptr=d_o,
        g_ptr=g,
        prefix_ptr=prefix,
        suffix_ptr=suffix,
        dq_ptr=dq,
        sums_ptr=sums,
        inner_ptr=inner,
        skipped_ptr=skipped,
        states_ptr=entering,
        places_ptr=given(launches.places, dq),
    )
    return QueryGradient(dq, sums, inner, skipped)


def gradients(
    x: ScalarRun,
    launches: ScalarLaunches,
    entering: Tensor,
    leaving: Tensor,
    adjoint: ScalarSegments,
    local: QueryGradient,
    d_o: Tensor,
    d_state_out: Tensor | None,
) -> Gradients:
    """dq and dk per value head; dv; dg; of weights and skips, where there are any."""
    unread = leaving
    d_states, after = given(adjoint.states, unread), given(adjoint.decays, unread)
    g, prefix, suffix = gate_operands(x, adjoint.gates, unread)
    places = given(launches.places, d_states)
    read = {
        "q_ptr": x.q, "k_ptr": x.k, "do_ptr": d_o, "g_ptr": g, "prefix_ptr": prefix, "suffix_ptr": suffix,
        "d_states_ptr": d_states, "after_ptr": after, "places_ptr": places, "d_state_out_ptr": d_state_out,
    }  # fmt: skip

    dk, dv = torch.empty_like(local.dq), torch.empty_like(x.v)
    if launches.paired:
        launches.key_value_gradient(v_ptr=x.v, dk_ptr=dk, dv_ptr=dv, **read)
        return local.dq, dk, dv, None
    launches.value_gradient(dv_ptr=dv, skip_ptr=given(x.skip, unread), blocks_ptr=unread, **read)
    sums = unread
    if launches.with_decay:
        sums = unread.new_empty(launches.sums)
    launches.key_gradient(v_ptr=x.v, dk_ptr=dk, sums_ptr=sums, inner_ptr=local.inner, **read)
    if not launches.with_decay:
        return local.dq, dk, dv, None
    dg = unread.new_empty(x.v.shape[:3])
    launches.gate_pairs(
        q_ptr=x.q,
        k_ptr=x.k,
        v_ptr=x.v,
        do_ptr=d_o,
        g_ptr=g,
        prefix_ptr=prefix,
        suffix_ptr=suffix,
        dg_ptr=dg,
        places_ptr=given(launches.chunk_places, dg),
    )
    dw = torch.empty_like(dg) if launches.weighs else dg
    launches.gate_gradient(
        g_ptr=g,
        prefix_ptr=prefix,
        q_sums_ptr=local.sums,
        k_sums_ptr=sums,
        inner_ptr=local.inner,
        state_out_ptr=leaving,
        dg_ptr=dg,
        dw_ptr=dw,
        places_ptr=places,
        d_state_out_ptr=d_state_out,
    )
    if launches.weighs:
        return local.dq, dk, dv, dg, dw, local.skipped.sum((0, 2))
    return local.dq, dk, dv, dg.sum((0, 1)) if x.g is not None and x.g.dim() == 1 else dg
