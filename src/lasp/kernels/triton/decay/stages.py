"""The decay family's stages on a GPU (contract: `lasp.recurrence.contract`).

summarize: K1 summary of every segment, scan over segments.  outputs: K2 sweep.
summarize_adjoint: K3 summary, reversed scan.  local_gradients: K4 sweep of dq.  gradients: K5 sweep of dk, dv, dg.
What is kept for backward is one state per segment, not per chunk, with other ranks' part applied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp.algebra import Identity, Scalar, Summary
from lasp.kernels.triton.decay.gates import HEAD, NONE, TOKEN
from lasp.kernels.triton.decay.key_value_gradient import key_value_gradient_kernel
from lasp.kernels.triton.decay.output import output_kernel
from lasp.kernels.triton.decay.plan import Plan, plan, tile
from lasp.kernels.triton.decay.query_gradient import query_gradient_kernel
from lasp.kernels.triton.decay.scan import scan_kernel
from lasp.kernels.triton.decay.summary import summary_kernel
from lasp.recurrence.contract import Run

GROUPED_HEADS = True
SCAN_BLOCK = 512


class Segments(NamedTuple):
    """States [B, H_v, segments, K, V] at one end of each segment, and decays [B, H_v, segments] (base 2) from the
    run's end on that side to them."""

    states: Tensor
    decays: Tensor


class Saved(NamedTuple):
    """States entering each segment [B, H_v, segments, K, V], and the state leaving the run [B, H_v, K, V]."""

    entering: Tensor
    leaving: Tensor


class QueryGradient(NamedTuple):
    """dq per value head [B, T, H_v, K], and the terms of dg that its sweep yields."""

    dq: Tensor
    terms: Tensor


def _kind(g: Tensor | None) -> int:
    if g is None:
        return NONE.value
    return HEAD.value if g.dim() == 1 else TOKEN.value


_processors: dict[torch.device, int] = {}


def plan_of(x: Run) -> Plan:
    """The launch configuration for x."""
    device = x.q.device
    if device not in _processors:
        is_cuda = device.type == "cuda"
        _processors[device] = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 4
    B, T, H_v, V = x.v.shape
    return plan(T, B * H_v, x.q.shape[3], V, x.q.element_size(), _processors[device])


def _summarize(x: Run, k: Tensor, v: Tensor, reverse: bool) -> tuple[Summary, Segments]:
    p = plan_of(x)
    B, T, H, K = k.shape
    H_v, V = v.shape[2:]
    kind = _kind(x.g)
    states = torch.empty(B, H_v, p.segments, K, V, dtype=torch.float32, device=k.device)
    decays = torch.empty(2, B, H_v, p.segments, dtype=torch.float32, device=k.device)
    total = torch.empty(B, H_v, K, V, dtype=torch.float32, device=k.device)
    total_decay = torch.empty(B, H_v, dtype=torch.float32, device=k.device)
    own, before = decays.unbind(0)
    slices = -(-V // p.summary_columns)
    summary_kernel[(slices * H_v * B, p.segments)](
        k, v, k if x.g is None else x.g, states, own, x.scale, T, H, H_v, p.segments, p.segment_chunks,
        K, V, tile(K), p.summary_columns, p.chunk, kind, reverse, p.precision,
        num_warps=p.summary_warps, num_stages=p.summary_stages,
    )  # fmt: skip
    scan_kernel[(-(-K * V // SCAN_BLOCK), B * H_v)](
        states, own, before, total, total_decay, p.segments, K * V, V, 1, SCAN_BLOCK, reverse
    )
    transition = Identity() if x.g is None else Scalar(total_decay)
    return Summary(transition, total), Segments(states, before)


def summarize(x: Run) -> tuple[Summary, Segments]:
    return _summarize(x, x.k, x.v, False)


def local_outputs(x: Run, totals: Segments) -> None:
    return None


def outputs(x: Run, totals: Segments, partial: None, state_in: Tensor) -> tuple[Tensor, Saved]:
    p = plan_of(x)
    B, T, H, K = x.q.shape
    H_v, V = x.v.shape[2:]
    o = torch.empty_like(x.v)
    leaving = torch.empty_like(state_in)
    output_kernel[(-(-V // p.columns) * H_v * B, p.segments)](
        x.q, x.k, x.v, x.q if x.g is None else x.g, o, totals.states, totals.decays, state_in, leaving,
        x.scale, T, H, H_v, p.segments, p.segment_chunks,
        K, V, tile(K), p.columns, p.chunk, _kind(x.g), p.exact, p.precision,
        num_warps=p.warps, num_stages=p.stages,
    )  # fmt: skip
    return o, Saved(totals.states, leaving)


def summarize_adjoint(x: Run, d_o: Tensor) -> tuple[Summary, Segments]:
    return _summarize(x, x.q, d_o, True)


def local_gradients(x: Run, saved: Saved, totals_adjoint: Segments, d_o: Tensor) -> QueryGradient:
    p = plan_of(x)
    B, T, H, K = x.q.shape
    H_v, V = x.v.shape[2:]
    slices = -(-K // p.columns)
    dq = torch.empty(B, T, H_v, K, dtype=_partial_dtype(x), device=x.q.device)
    with_decay = x.g is not None
    terms = torch.empty(slices, B, T, H_v, dtype=torch.float32, device=dq.device) if with_decay else dq
    query_gradient_kernel[(slices * H_v * B, p.segments)](
        x.q, x.k, x.v, d_o, x.q if x.g is None else x.g, dq, saved.entering, terms,
        x.scale, T, H, H_v, p.segments, p.segment_chunks, B * T,
        K, V, p.columns, tile(V), p.chunk, _kind(x.g), with_decay, p.exact, p.precision,
        num_warps=p.warps, num_stages=p.stages,
    )  # fmt: skip
    return QueryGradient(dq, terms)


def gradients(
    x: Run, saved: Saved, totals_adjoint: Segments, local: QueryGradient, d_o: Tensor, d_state_out: Tensor
) -> tuple[Tensor | None, ...]:
    p = plan_of(x)
    B, T, H, K = x.q.shape
    H_v, V = x.v.shape[2:]
    slices_k, slices_v = -(-K // p.columns), -(-V // p.columns)
    dk = torch.empty_like(local.dq)
    dv = torch.empty_like(x.v)
    with_decay = x.g is not None
    dg = torch.empty_like(local.terms) if with_decay else dk
    key_value_gradient_kernel[((slices_k + slices_v) * H_v * B, p.segments)](
        x.q, x.k, x.v, d_o, x.q if x.g is None else x.g, dk, dv, local.terms, dg,
        saved.entering, saved.leaving, totals_adjoint.states, totals_adjoint.decays, d_state_out,
        x.scale, T, H, H_v, p.segments, p.segment_chunks, B * T,
        K, V, p.columns, p.columns, tile(K), tile(V), p.chunk, _kind(x.g), with_decay, p.exact, p.precision,
        num_warps=p.warps, num_stages=p.stages,
    )  # fmt: skip
    d_gate = None
    if x.g is not None:
        d_gate = dg.sum((0, 1, 2)) if x.g.dim() == 1 else dg.sum(0) if slices_k > 1 else dg[0]
    return _sum_groups(x, local.dq), _sum_groups(x, dk), dv, d_gate


def _partial_dtype(x: Run) -> torch.dtype:
    """Of dq and dk per value head: fp32 where heads of one group are still to be summed."""
    return x.q.dtype if x.q.shape[2] == x.v.shape[2] else torch.float32


def _sum_groups(x: Run, gradient: Tensor) -> Tensor:
    """[B, T, H_v, K] -> [B, T, H, K]."""
    heads = x.q.shape[2]
    if gradient.shape[2] == heads:
        return gradient
    return gradient.unflatten(2, (heads, -1)).sum(3).to(x.q.dtype)
