"""The stages for a gate per key channel; `stages` gives the same names for every kind of decay."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.triton.decay.layout import chunks_of, places_of
from lasp.kernels.triton.decay.plan import Plan
from lasp.kernels.triton.decay.work import BASE_LEVELS, Work
from lasp.recurrence.contract import Run


class Segments(NamedTuple):
    """States [B, H_v, segments, K, V] at one end of each segment, and decays [B, H_v, segments, K] (base 2) from the
    run's end on that side to them."""

    states: Tensor
    decays: Tensor


class Prepared(NamedTuple):
    """Per chunk: scores [B, H_v, T, C], scale q 2^prefix and k 2^suffix [B, T, H_v, K], and the chunks' log-decays
    [B, H_v, chunks, K] (base 2)."""

    scores: Tensor
    from_start: Tensor
    to_end: Tensor
    totals: Tensor


class Saved(NamedTuple):
    """States entering each segment [B, H_v, segments, K, V], the state leaving the run [B, H_v, K, V], and what was
    prepared per chunk."""

    entering: Tensor
    leaving: Tensor
    prepared: Prepared


class QueryReads(NamedTuple):
    """What do reads from the states [B, T, H_v, K], and what that adds to dg, per chunk [B, H_v, chunks, K]."""

    read_q: Tensor
    sums: Tensor


@functools.cache
def stretch_matrices(chunk: int, exact: bool, device: torch.device) -> Tensor:
    """[1 + levels, C, C], fp32 if `exact` else fp16: at each level, row i sums the gates between token i and the middle
    of its block; first, that of the base blocks.

    The levels are those at which tokens of a chunk meet, see channel_prepare.
    """
    i, j = torch.arange(chunk)[:, None], torch.arange(chunk)[None, :]
    matrices = []
    for level in range(chunk.bit_length() - 1):
        half = i >> level
        matrices.append(((half == j >> level) & torch.where(half % 2 == 1, j <= i, j > i)).float())
    base = BASE_LEVELS - 1
    # Between early tokens and the middle, sums count negative.
    late = (i >> base) % 2 == 1
    matrices.insert(0, torch.where(late, matrices[base], -matrices[base]))
    return torch.stack(matrices).to(device, torch.float32 if exact else torch.float16).contiguous()


def empty_prepared(q: Tensor, v: Tensor, p: Plan) -> Prepared:
    (B, T, H_v, _), K = v.shape, q.shape[3]
    scores = q.new_empty(B, H_v, T, p.chunk)
    from_start, to_end = (q.new_empty(B, T, H_v, K) for _ in range(2))
    return Prepared(scores, from_start, to_end, q.new_empty(B, H_v, p.chunks, K, dtype=torch.float32))


def local_outputs(x: Run, work: Work) -> Prepared:
    p = work.plan
    ready = empty_prepared(x.q, x.v, p)
    stretches = stretch_matrices(p.chunk, p.exact, x.q.device)
    work.channel_prepare(x.q, x.k, x.g, stretches, *ready, chunks_of(p, ready.totals))
    return ready


def local_gradients(x: Run, work: Work, saved: Saved, d_o: Tensor) -> QueryReads:
    ready = saved.prepared
    read_q = x.q.new_empty(work.gradient, dtype=read_dtype(x.q.dtype))
    sums = torch.empty_like(ready.totals)
    work.channel_query_reads(
        ready.from_start, ready.to_end, x.v, d_o, ready.totals, read_q, sums, saved.entering, places_of(work.plan, sums)
    )
    return QueryReads(read_q, sums)


def gradients(
    x: Run, work: Work, saved: Saved, adjoint: Segments, local: QueryReads, d_o: Tensor, d_state_out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq and dk per value head; dv; dg."""
    p, ready = work.plan, saved.prepared
    places = places_of(p, adjoint.states)
    read_k, carry = torch.empty_like(local.read_q), torch.empty_like(local.sums)
    work.channel_key_reads(
        ready.from_start, ready.to_end, x.v, d_o, ready.totals, read_k, local.sums, carry,
        saved.entering, saved.leaving, *adjoint, places, d_state_out,
    )  # fmt: skip
    dq = x.q.new_empty(work.gradient, dtype=work.gradient_dtype)
    dk, dg = torch.empty_like(dq), carry.new_empty(work.gradient)
    work.channel_within(
        x.q, x.k, x.v, d_o, x.g, stretch_matrices(p.chunk, p.exact, x.q.device), local.read_q, read_k, carry,
        dq, dk, dg, chunks_of(p, carry),
    )  # fmt: skip
    dv = torch.empty_like(x.v)
    work.channel_value_gradient(
        ready.from_start, ready.to_end, d_o, ready.totals, ready.scores, dv, *adjoint, places, d_state_out
    )
    return dq, dk, dv, dg


def read_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is read from states lacks their decays: it may exceed fp16's range."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
