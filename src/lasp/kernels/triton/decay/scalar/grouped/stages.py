"""The backward stages where value heads share heads of q and k."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.kernels.triton.common.launch import given
from lasp.kernels.triton.decay.launches import SegmentSums
from lasp.kernels.triton.decay.scalar.grouped.launches import GroupedLaunches
from lasp.kernels.triton.decay.scalar.stages import ScalarRun, ScalarSegments, gate_operands
from lasp.recurrence.stages import Gradients


def block_states(x: ScalarRun, launches: GroupedLaunches, gates: tuple[Tensor, ...], entering: Tensor) -> Tensor:
    """S^T before each block, [B, H_v, blocks, V, K]."""
    blocks = x.v.new_empty(launches.blocks)
    g, prefix, suffix = gate_operands(x, gates, entering)
    launches.block_states(
        keys_ptr=x.k,
        values_ptr=x.v,
        g_ptr=g,
        prefix_ptr=prefix,
        suffix_ptr=suffix,
        states_ptr=entering,
        decays_ptr=entering,
        blocks_ptr=blocks,
    )
    return blocks


def summarize(
    x: ScalarRun,
    launches: GroupedLaunches,
    sums: SegmentSums,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, ...],
    *,
    reverse: bool,
) -> None:
    """Write the sums of every segment, as the function of that name elsewhere."""
    states, decays = sums
    g, prefix, suffix = gate_operands(x, gates, states)
    launch = launches.summary_adjoint if reverse else launches.summary
    launch(
        keys_ptr=k,
        values_ptr=v,
        g_ptr=g,
        prefix_ptr=prefix,
        suffix_ptr=suffix,
        states_ptr=states,
        decays_ptr=decays,
        blocks_ptr=states,
    )


def outputs(
    x: ScalarRun,
    launches: GroupedLaunches,
    totals: ScalarSegments,
    o: Tensor,
    leaving: Tensor,
    state_in: Tensor | None,
) -> Tensor:
    """The states entering segments, by the sweep that Hopper has of its own."""
    assert totals.states is not None and totals.decays is not None
    _, prefix, suffix = gate_operands(x, totals.gates, leaving)
    launches.output(
        a_ptr=x.q,
        b_ptr=x.k,
        c_ptr=x.v,
        prefix_ptr=prefix,
        suffix_ptr=suffix,
        out_ptr=o,
        states_ptr=totals.states,
        decays_ptr=totals.decays,
        state_out_ptr=leaving,
        skip_ptr=given(x.skip, leaving),
        blocks_ptr=leaving,
        outside_ptr=state_in,
    )
    return totals.states


def gradients(
    x: ScalarRun,
    launches: GroupedLaunches,
    adjoint: ScalarSegments,
    s_blocks: Tensor,
    d_o: Tensor,
    d_state_out: Tensor | None,
) -> Gradients:
    """dq, dk, dv; dg; of weights and skips, where there are any."""
    assert adjoint.states is not None and adjoint.decays is not None
    unread = adjoint.states
    g, prefix, suffix = gate_operands(x, adjoint.gates, unread)
    dv, d_blocks = torch.empty_like(x.v), torch.empty_like(s_blocks)
    skip = given(x.skip, unread)
    if launches.own:
        launches.value_gradient(
            a_ptr=x.k,
            b_ptr=x.q,
            c_ptr=d_o,
            prefix_ptr=prefix,
            suffix_ptr=suffix,
            out_ptr=dv,
            states_ptr=adjoint.states,
            decays_ptr=adjoint.decays,
            state_out_ptr=unread,
            skip_ptr=skip,
            blocks_ptr=d_blocks,
            outside_ptr=d_state_out,
        )
    else:
        launches.value_gradient(
            q_ptr=x.q,
            k_ptr=x.k,
            do_ptr=d_o,
            g_ptr=g,
            prefix_ptr=prefix,
            suffix_ptr=suffix,
            dv_ptr=dv,
            d_states_ptr=adjoint.states,
            after_ptr=adjoint.decays,
            skip_ptr=skip,
            blocks_ptr=d_blocks,
            places_ptr=unread,
            d_state_out_ptr=d_state_out,
        )
    pairs, sums = x.q.new_empty(launches.pairs), unread.new_empty(launches.token_sums)
    across, scores, skipped = (unread.new_empty(size) for size in (launches.across, launches.scores, launches.skipped))
    shared = {"prefix_ptr": prefix, "suffix_ptr": suffix, "pairs_ptr": pairs, "sums_ptr": sums}
    launches.group_pairs(q_ptr=x.q, k_ptr=x.k, v_ptr=x.v, do_ptr=d_o, scores_ptr=scores, **shared)
    shared |= {"others_ptr": s_blocks, "across_ptr": across}
    dq, dk = torch.empty_like(x.q), torch.empty_like(x.k)
    launches.group_queries(x_ptr=x.q, other_ptr=x.k, rows_ptr=d_o, states_ptr=s_blocks, dx_ptr=dq, **shared)
    launches.group_keys(x_ptr=x.k, other_ptr=x.q, rows_ptr=x.v, states_ptr=d_blocks, dx_ptr=dk, **shared)
    dg = unread.new_empty(x.v.shape[:3])
    dw = torch.empty_like(dg) if launches.weighs else dg
    launches.group_gates(
        sums_ptr=sums,
        across_ptr=across,
        prefix_ptr=prefix,
        suffix_ptr=suffix,
        scores_ptr=scores,
        dg_ptr=dg,
        dw_ptr=dw,
        skipped_ptr=skipped,
    )
    return (dq, dk, dv, dg, dw, skipped.sum((0, 2))) if launches.weighs else (dq, dk, dv, dg)
