# mypy: ignore-errors
"""Reads from states, backward, for a gate per channel: sweeps of a slice of channels, all of V contracted.

    read_q_i = S do_i        S: the state entering i's chunk, of the decayed past
    read_k_j = D v_j         D: the gradient of the state leaving j's chunk, of the decayed future

Decays within the chunk are left to channel_intra_chunk, which completes dq, dk and dg. Here each sweep also sums, per
chunk and channel, what its reads add to dg,

    sums = sum_i (scale q_i 2^prefix_i) read_q_i,        and        sum_j (k_j 2^suffix_j) read_k_j,

and leaves its states before intervals: channel_through makes of both what passes through each chunk. States and
outputs are transposed as in `sweep`, so these sums run along a thread's own columns.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import decayed
from lasp.kernels.triton.common.program import (
    load_chunk,
    rows_of,
    run_of,
    store_chunk,
    sweep_place,
    view,
)
from lasp.kernels.triton.decay.channel.decays import channel_tile, gate_heads_of, segment_border
from lasp.kernels.triton.decay.intervals import first_interval, interval_of_strongest, leave, of_passed
from lasp.kernels.triton.decay.scalar.sweep import read_state

AT_A_TIME = tl.constexpr(16)  # chunks


class KeyOperands(NamedTuple):
    """The rows of a sweep, of all batches and heads.

    Attributes:
        a_ptr: [B, T, H_v, V], do, or v when REVERSE: rows that read the state.
        b_ptr: v, or do: the rows that feed it.
        c_ptr: [B, T, H_g, K], k 2^suffix, or scale q 2^prefix: rows that feed it.
        x_ptr: the other of the two: the weights of what is read.
        totals_ptr: fp32 [B, H_g, chunks, K].
        out_ptr: [B, T, H_v, K], written.
        sums_ptr: fp32 [B, H_v, chunks, K], written.
        inner_ptr: bf16 or fp32 [B, H_v, chunks / SHORTEST + segments, 2, slices, BK BV]: S and D before intervals, of
            which a sweep writes its own.
    """

    a_ptr: tl.tensor
    b_ptr: tl.tensor
    c_ptr: tl.tensor
    x_ptr: tl.tensor
    totals_ptr: tl.tensor
    out_ptr: tl.tensor
    sums_ptr: tl.tensor
    inner_ptr: tl.tensor


@triton.jit
def chunks_of(here, H_v, chunks, K: tl.constexpr, C: tl.constexpr):
    """Offset of a segment's chunks in [B, H_v, chunks, K], less its first token's."""
    return (run_of(here, H_v) * chunks + here.chunk - here.first // C) * K


@triton.jit
def interval_of_channels(
    totals_ptr, chunks, column, K: tl.constexpr, BK: tl.constexpr, SHORTEST: tl.constexpr, LONGEST: tl.constexpr
):
    """Chunks of an interval of so many, whose log-decays begin at totals_ptr, as `interval_of` has a head's: of a
    sweep's channels, from `column` on."""
    if SHORTEST == LONGEST:
        return LONGEST
    else:
        channel = column + tl.arange(0, BK)
        strongest = tl.zeros((BK,), tl.float32)
        for first in range(0, chunks, AT_A_TIME):
            chunk = first + tl.arange(0, AT_A_TIME)[:, None]
            mask = (chunk < chunks) & (channel < K)
            totals = tl.load(totals_ptr + tl.cast(chunk, tl.int64) * K + channel, mask=mask, other=0.0)
            strongest = tl.minimum(strongest, tl.min(of_passed(totals), 0))
        return interval_of_strongest(tl.min(strongest, 0), SHORTEST, LONGEST)


@triton.jit
def _sweep(
    operands,
    program,  # ProgramPlace
    state,  # [BK, BV]
    column,
    T,
    H_g,
    H_v,
    segments,
    chunks_of_run,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = operands.a_ptr.dtype.element_ty
    first = program.first
    last = program.last
    _, token_head = rows_of(program, T, H_v, H_v)
    v_row = H_v * V
    out_row = H_v * K
    k_row = H_g * K
    gate_run, gate_row = gate_heads_of(program, T, H_g, H_v)
    totals_ptr = operands.totals_ptr + (gate_run * chunks_of_run + program.chunk - first // C) * K
    of_chunks = chunks_of(program, H_v, chunks_of_run, K, C)
    sums_ptr = operands.sums_ptr + of_chunks
    a_view = view(operands.a_ptr + token_head * V, last, v_row, V, C, BV, DESCRIPTORS)
    b_view = view(operands.b_ptr + token_head * V, last, v_row, V, C, BV, DESCRIPTORS)
    c_view = view(operands.c_ptr + gate_row * K, last, k_row, K, C, BK, DESCRIPTORS)
    x_view = view(operands.x_ptr + gate_row * K, last, k_row, K, C, BK, DESCRIPTORS)
    out_view = view(operands.out_ptr + token_head * K, last, out_row, K, C, BK, DESCRIPTORS)
    channel = column + tl.arange(0, BK)
    chunks = tl.cdiv(last - first, C)
    of_segment = totals_ptr + tl.cast(first // C, tl.int64) * K
    interval = interval_of_channels(of_segment, chunks, column, K, BK, SHORTEST, LONGEST)
    run = run_of(program, H_v)
    size: tl.constexpr = (K + BK - 1) // BK * (BK * BV)
    inner_row: tl.constexpr = 2 * size
    place = first_interval(run, program.segment, program.chunk, segments, chunks_of_run, SHORTEST)
    inner_ptr = operands.inner_ptr + place * inner_row + (size if REVERSE else 0) + program.part * (BK * BV)
    for step in range(chunks):
        index = chunks - 1 - step if REVERSE else step
        start = first + index * C
        # Intervals are of a power of two.
        begins = (index & (interval - 1)) == 0
        if not REVERSE and begins:
            leave(inner_ptr + index // SHORTEST * inner_row, state)
        a = load_chunk(a_view, start, 0, last, v_row, V, C, BV, DESCRIPTORS)
        b = load_chunk(b_view, start, 0, last, v_row, V, C, BV, DESCRIPTORS)
        c = load_chunk(c_view, start, column, last, k_row, K, C, BK, DESCRIPTORS)
        x = load_chunk(x_view, start, column, last, k_row, K, C, BK, DESCRIPTORS)
        here = tl.cast(start // C, tl.int64) * K + channel
        total = tl.load(totals_ptr + here, mask=channel < K, other=0.0)
        out = read_state(state, tl.trans(a), True, PRECISION)
        state = decayed(state, total[:, None], dtype == tl.float32)
        state = tl.dot(tl.trans(c), b, state, input_precision=PRECISION)
        if REVERSE and begins:
            leave(inner_ptr + index // SHORTEST * inner_row, state)
        # In two steps: Triton 3.7.1 fails to compile one for sm_100.
        own = tl.reshape(tl.trans(x).to(tl.float32) * out, (BK, 2, C // 2))
        sums = tl.sum(tl.sum(own, 2), 1)
        if dtype == tl.bfloat16:
            # As in `rows`: only what a product takes is loaded ahead.
            sums += tl.sum(tl.dot(tl.trans(x), tl.zeros((C, 16), dtype)), 1)
        tl.store(sums_ptr + here, sums, mask=channel < K)
        read = tl.trans(out).to(operands.out_ptr.dtype.element_ty)
        store_chunk(out_view, read, start, column, last, out_row, K, C, BK, DESCRIPTORS)


@triton.jit(do_not_specialize=["T", "H_g", "H_v", "segments", "segment_chunks", "chunks"])
def channel_query_inter_chunk_kernel(
    from_start_ptr,  # [B, T, H_g, K]: scale q 2^prefix
    to_end_ptr,  # [B, T, H_g, K]: k 2^suffix
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    totals_ptr,  # fp32 [B, H_g, chunks, K]
    read_q_ptr,  # [B, T, H_v, K], written
    sums_ptr,  # fp32 [B, H_v, chunks, K], written
    inner_ptr,  # written, see `KeyOperands`
    states_ptr,  # fp32 [B, H_v, segments, K, V], those entering each segment; not read if WHOLE
    places_ptr,  # int32 [segments, 7] if PACKED
    T,
    H_g,
    H_v,
    segments,
    segment_chunks,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    WHOLE: tl.constexpr,  # as in channel_output
    SHORTEST: tl.constexpr,  # interval, in chunks: see `interval_of`
    LONGEST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    here, index, k_first = sweep_place(places_ptr, segments, segment_chunks, T, H_v, K, BK, C, PACKED)
    state, _, _ = segment_border(
        states_ptr, None, None, index, here.border, channel_tile(k_first, 0, K, V), BK, BV, WHOLE
    )
    operands = KeyOperands(
        a_ptr=do_ptr, b_ptr=v_ptr, c_ptr=to_end_ptr, x_ptr=from_start_ptr,
        totals_ptr=totals_ptr, out_ptr=read_q_ptr, sums_ptr=sums_ptr, inner_ptr=inner_ptr,
    )  # fmt: skip
    _sweep(
        operands, here, state, k_first, T, H_g, H_v, segments, chunks,
        K=K, V=V, BK=BK, BV=BV, C=C, REVERSE=False, SHORTEST=SHORTEST, LONGEST=LONGEST,
        DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H_g", "H_v", "segments", "segment_chunks", "chunks"])
def channel_key_inter_chunk_kernel(
    from_start_ptr,  # [B, T, H_g, K]: scale q 2^prefix
    to_end_ptr,  # [B, T, H_g, K]: k 2^suffix
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    totals_ptr,  # fp32 [B, H_g, chunks, K]
    read_k_ptr,  # [B, T, H_v, K], written
    sums_ptr,  # fp32 [B, H_v, chunks, K], written
    inner_ptr,  # written, see `KeyOperands`
    d_states_ptr,  # fp32 [B, H_v, segments, K, V]: gradients of those leaving each segment, from zero; see WHOLE
    after_ptr,  # fp32 [B, H_v, segments, K]: decay from each segment to the run's end; see WHOLE
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # fp32 [B, H_v, K, V], or None for zero
    T,
    H_g,
    H_v,
    segments,
    segment_chunks,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    WHOLE: tl.constexpr,  # as in channel_output
    SHORTEST: tl.constexpr,  # interval, in chunks: see `interval_of`
    LONGEST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    here, index, k_first = sweep_place(places_ptr, segments, segment_chunks, T, H_v, K, BK, C, PACKED)
    state, _, _ = segment_border(
        d_states_ptr, after_ptr, d_state_out_ptr, index, here.border, channel_tile(k_first, 0, K, V), BK, BV, WHOLE
    )
    operands = KeyOperands(
        a_ptr=v_ptr, b_ptr=do_ptr, c_ptr=from_start_ptr, x_ptr=to_end_ptr,
        totals_ptr=totals_ptr, out_ptr=read_k_ptr, sums_ptr=sums_ptr, inner_ptr=inner_ptr,
    )  # fmt: skip
    _sweep(
        operands, here, state, k_first, T, H_g, H_v, segments, chunks,
        K=K, V=V, BK=BK, BV=BV, C=C, REVERSE=True, SHORTEST=SHORTEST, LONGEST=LONGEST,
        DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
    )  # fmt: skip
