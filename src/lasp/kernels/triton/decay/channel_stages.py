"""The stages for a gate per key channel; `stages` gives the same names for every kind of decay."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.algebra import Diagonal, Summary
from lasp.kernels.triton.common.launch import launch
from lasp.kernels.triton.decay.channel_output import channel_output_kernel, channel_value_gradient_kernel
from lasp.kernels.triton.decay.channel_prepare import channel_prepare_kernel
from lasp.kernels.triton.decay.channel_reads import channel_key_reads_kernel, channel_query_reads_kernel
from lasp.kernels.triton.decay.channel_summary import channel_summary_kernel
from lasp.kernels.triton.decay.channel_within import channel_within_kernel
from lasp.kernels.triton.decay.layout import chunks_of, places_of
from lasp.kernels.triton.decay.plan import Plan, tile
from lasp.kernels.triton.decay.scan import scan_segments
from lasp.recurrence.contract import Run

# A program of one chunk would spend longer on making descriptors than on its chunk.
SINGLE_CHUNK_DESCRIPTORS = False
# Base blocks have 2^BASE_LEVELS tokens where the dtype has the range for it, see channel_prepare.
BASE_LEVELS = 3


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


def summarize(x: Run, p: Plan, k: Tensor, v: Tensor, reverse: bool) -> tuple[Summary, Segments]:
    B, T, H, K = k.shape
    H_v, V = v.shape[2:]
    empty = {"dtype": torch.float32, "device": k.device}
    states = torch.empty(B, H_v, p.segments, K, V, **empty)
    decays = torch.empty(2, B, H_v, p.segments, K, **empty)
    places = places_of(p, states)
    columns, warps, stages = p.channels
    launch(
        channel_summary_kernel, (-(-K // columns) * H_v * B, p.segments), (k, v, x.g, states, decays[0], places),
        (x.scale, T, H, H_v, p.segments, p.segment_chunks, p.chunks),
        (K, V, columns, tile(V, x.q.dtype), p.chunk, reverse, p.descriptors, p.packed, p.precision), warps, stages,
    )  # fmt: skip
    total, total_decay = scan_segments(x, p, states, decays[0], decays[1], reverse=reverse)
    return Summary(Diagonal(total_decay), total), Segments(states, decays[1])


def empty_prepared(q: Tensor, v: Tensor, p: Plan) -> Prepared:
    (B, T, H_v, _), K = v.shape, q.shape[3]
    scores = q.new_empty(B, H_v, T, p.chunk)
    from_start, to_end = (q.new_empty(B, T, H_v, K) for _ in range(2))
    return Prepared(scores, from_start, to_end, q.new_empty(B, H_v, p.chunks, K, dtype=torch.float32))


def local_outputs(x: Run, p: Plan) -> Prepared:
    B, T, H, K = x.q.shape
    H_v = x.v.shape[2]
    ready = empty_prepared(x.q, x.v, p)
    columns, warps, stages = p.channel_prepare
    launch(
        channel_prepare_kernel, (H_v * B, p.chunks),
        (x.q, x.k, x.g, stretch_matrices(p.chunk, p.exact, x.q.device), *ready, chunks_of(p, ready.totals)),
        (x.scale, T, H, H_v, p.chunks),
        (K, columns, p.chunk, base_levels(x), p.chunk.bit_length() - 1, SINGLE_CHUNK_DESCRIPTORS, p.packed,
         p.precision),
        warps, stages,
    )  # fmt: skip
    return ready


def outputs(x: Run, p: Plan, totals: Segments, prepared: Prepared, state_in: Tensor) -> tuple[Tensor, Saved]:
    B, T, _, K = x.q.shape
    H_v, V = x.v.shape[2:]
    o, leaving = torch.empty_like(x.v), torch.empty_like(state_in)
    columns, warps, stages = p.channel_values
    launch(
        channel_output_kernel, (-(-V // columns) * H_v * B, p.segments),
        (prepared.from_start, prepared.to_end, x.v, prepared.totals, prepared.scores, o,
         totals.states, totals.decays, state_in, leaving, places_of(p, leaving)),
        (x.scale, T, H_v, p.segments, p.segment_chunks, p.chunks),
        (K, V, tile(K, x.q.dtype), columns, p.chunk, p.descriptors, p.packed, p.precision), warps, stages,
    )  # fmt: skip
    return o, Saved(totals.states, leaving, prepared)


def local_gradients(x: Run, p: Plan, saved: Saved, d_o: Tensor) -> QueryReads:
    B, T, H_v, V = x.v.shape
    K, ready = x.q.shape[3], saved.prepared
    read_q = torch.empty(B, T, H_v, K, dtype=read_dtype(x), device=x.q.device)
    sums = torch.empty_like(ready.totals)
    columns, warps, stages = p.channel_reads
    launch(
        channel_query_reads_kernel, (-(-K // columns) * H_v * B, p.segments),
        (ready.from_start, ready.to_end, x.v, d_o, ready.totals, read_q, sums, saved.entering,
         places_of(p, sums)),
        (T, H_v, p.segments, p.segment_chunks, p.chunks),
        (K, V, columns, tile(V, x.q.dtype), p.chunk, p.descriptors, p.packed, p.precision), warps, stages,
    )  # fmt: skip
    return QueryReads(read_q, sums)


def gradients(
    x: Run, p: Plan, saved: Saved, adjoint: Segments, local: QueryReads, d_o: Tensor, d_state_out: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq and dk per value head, of `dtype`; dv; dg."""
    B, T, H, K = x.q.shape
    H_v, V = x.v.shape[2:]
    ready, padded = saved.prepared, tile(V, x.q.dtype)
    places = places_of(p, adjoint.states)
    read_k, carry = torch.empty_like(local.read_q), torch.empty_like(local.sums)
    columns, warps, stages = p.channel_reads
    launch(
        channel_key_reads_kernel, (-(-K // columns) * H_v * B, p.segments),
        (ready.from_start, ready.to_end, x.v, d_o, ready.totals, read_k, local.sums, carry,
         saved.entering, saved.leaving, adjoint.states, adjoint.decays, d_state_out, places),
        (T, H_v, p.segments, p.segment_chunks, p.chunks),
        (K, V, columns, padded, p.chunk, p.descriptors, p.packed, p.precision), warps, stages,
    )  # fmt: skip
    dq, dk = (torch.empty(B, T, H_v, K, dtype=dtype, device=x.q.device) for _ in range(2))
    dg = torch.empty(B, T, H_v, K, dtype=torch.float32, device=x.q.device)
    columns, warps, stages = p.channel_within
    launch(
        channel_within_kernel, (-(-K // columns) * H_v * B, p.chunks),
        (x.q, x.k, x.v, d_o, x.g, stretch_matrices(p.chunk, p.exact, x.q.device), local.read_q, read_k, carry,
         dq, dk, dg, chunks_of(p, carry)),
        (x.scale, T, H, H_v, p.chunks),
        (K, V, columns, padded, p.chunk, base_levels(x), p.chunk.bit_length() - 1, SINGLE_CHUNK_DESCRIPTORS, p.packed,
         p.precision),
        warps, stages,
    )  # fmt: skip
    dv = torch.empty_like(x.v)
    columns, warps, stages = p.channel_values
    launch(
        channel_value_gradient_kernel, (-(-V // columns) * H_v * B, p.segments),
        (ready.from_start, ready.to_end, d_o, ready.totals, ready.scores, dv,
         adjoint.states, adjoint.decays, d_state_out, places),
        (x.scale, T, H_v, p.segments, p.segment_chunks, p.chunks),
        (K, V, tile(K, x.q.dtype), columns, p.chunk, p.descriptors, p.packed, p.precision), warps, stages,
    )  # fmt: skip
    return dq, dk, dv, dg


def base_levels(x: Run) -> int:
    return BASE_LEVELS if x.q.dtype == torch.bfloat16 else 0


def read_dtype(x: Run) -> torch.dtype:
    """What is read from states lacks their decays: it may exceed fp16's range."""
    return torch.bfloat16 if x.q.dtype == torch.bfloat16 else torch.float32
