# mypy: ignore-errors
"""Reads from states, backward, for a gate per channel: sweeps of a slice of channels, all of V contracted.

    read_q_i = S do_i        S: the state entering i's chunk, of the decayed past
    read_k_j = D v_j         D: the gradient of the state leaving j's chunk, of the decayed future

Decays within the chunk are left to channel_intra_chunk, which completes dq, dk and dg. Here each sweep also sums, per
chunk and channel, what its reads add to dg,

    sums = sum_i (scale q_i 2^prefix_i) read_q_i,        and        sum_j (k_j 2^suffix_j) read_k_j,

since dg at a chunk's end, S D summed over V, is that at the segment's end plus the first and minus the second of all
later chunks. Less the second of the chunk itself it is `through`: what passes from before the chunk to after it.
Nothing does in a channel that forgets within the chunk: there the sums start anew, and what leaves the chunk is what
its own tokens add. What rounding adds to the sums, a random walk, is known at the segment's start, where S D can be
taken again: it is taken off, less towards the end. Through the segment's first chunk goes what S D leaves of it, all of
which is decayed by the first gates as dg is. States and outputs are transposed as in `sweep`, so these sums run along a
thread's own columns.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import beyond_one, decayed
from lasp.kernels.triton.common.program import (
    as_swept,
    load_chunk,
    rows_of,
    run_bounds,
    run_of,
    state_tile,
    store_chunk,
    sweep_place,
    view,
)
from lasp.kernels.triton.decay.channel.decays import channel_tile, gate_heads_of, segment_border
from lasp.kernels.triton.decay.scalar.sweep import read_state

TIED = tl.constexpr(16)  # chunks at a time


class KeyOperands(NamedTuple):
    """The rows of a sweep, of all batches and heads.

    Attributes:
        a_ptr: [B, T, H_v, V], do, or v when REVERSE: rows that read the state.
        b_ptr: v, or do: the rows that feed it.
        c_ptr: [B, T, H_g, K], k 2^suffix, or scale q 2^prefix: rows that feed it.
        x_ptr: the other of the two: the weights of what is read.
        totals_ptr: fp32 [B, H_g, chunks, K].
        out_ptr: [B, T, H_v, K], written.
        sums_ptr: fp32 [B, H_v, chunks, K]: written, or read when REVERSE.
        through_ptr: likewise, written when REVERSE.
    """

    a_ptr: tl.tensor
    b_ptr: tl.tensor
    c_ptr: tl.tensor
    x_ptr: tl.tensor
    totals_ptr: tl.tensor
    out_ptr: tl.tensor
    sums_ptr: tl.tensor
    through_ptr: tl.tensor


@triton.jit
def _first_chunk(here, H_v, chunks, K: tl.constexpr, C: tl.constexpr):
    """Offset of a segment's chunks in [B, H_v, chunks, K], less its first token's."""
    return (run_of(here, H_v) * chunks + here.chunk - here.first // C) * K


@triton.jit
def _sweep(
    operands,
    program,  # ProgramPlace
    state,  # [BK, BV]
    carry,  # [BK]
    from_nothing,  # whether no state enters the first chunk
    to_nothing,  # whether that which leaves the last has no gradient
    column,
    T,
    H_g,
    H_v,
    chunks_of_run,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    FORGETS: tl.constexpr,
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
    of_chunks = _first_chunk(program, H_v, chunks_of_run, K, C)
    totals_ptr = operands.totals_ptr + (gate_run * chunks_of_run + program.chunk - first // C) * K
    sums_ptr = operands.sums_ptr + of_chunks
    through_ptr = operands.through_ptr + of_chunks
    a_view = view(operands.a_ptr + token_head * V, last, v_row, V, C, BV, DESCRIPTORS)
    b_view = view(operands.b_ptr + token_head * V, last, v_row, V, C, BV, DESCRIPTORS)
    c_view = view(operands.c_ptr + gate_row * K, last, k_row, K, C, BK, DESCRIPTORS)
    x_view = view(operands.x_ptr + gate_row * K, last, k_row, K, C, BK, DESCRIPTORS)
    out_view = view(operands.out_ptr + token_head * K, last, out_row, K, C, BK, DESCRIPTORS)
    channel = column + tl.arange(0, BK)
    chunks = tl.cdiv(last - first, C)
    walked = tl.zeros((BK,), tl.int32) + chunks
    later_sums = carry
    for step in range(chunks):
        start = first + (chunks - 1 - step if REVERSE else step) * C
        a = load_chunk(a_view, start, 0, last, v_row, V, C, BV, DESCRIPTORS)
        b = load_chunk(b_view, start, 0, last, v_row, V, C, BV, DESCRIPTORS)
        c = load_chunk(c_view, start, column, last, k_row, K, C, BK, DESCRIPTORS)
        x = load_chunk(x_view, start, column, last, k_row, K, C, BK, DESCRIPTORS)
        here = tl.cast(start // C, tl.int64) * K + channel
        total = tl.load(totals_ptr + here, mask=channel < K, other=0.0)
        if REVERSE:
            # Loaded first, used last.
            other_sums = tl.load(sums_ptr + here, mask=channel < K, other=0.0)
        out = read_state(state, tl.trans(a), True, PRECISION)
        state = decayed(state, total[:, None], dtype == tl.float32)
        state = tl.dot(tl.trans(c), b, state, input_precision=PRECISION)
        # In two steps: Triton 3.7.1 fails to compile one for sm_100.
        own = tl.reshape(tl.trans(x).to(tl.float32) * out, (BK, 2, C // 2))
        sums = tl.sum(tl.sum(own, 2), 1)
        if dtype == tl.bfloat16:
            # As in `rows`: only what a product takes is loaded ahead.
            sums += tl.sum(tl.dot(tl.trans(x), tl.zeros((C, 16), dtype)), 1)
        if REVERSE:
            cut = ((start == first) & from_nothing) | ((start + C >= last) & to_nothing)
            forgets = (beyond_one(total, tl.minimum(last - start, C)) < FORGETS) | cut
            index = chunks - 1 - step
            # Through the chunk after one that forgets, unless that forgets too: of what is known to leave this one.
            tl.store(through_ptr + here + K, sums - later_sums, mask=forgets & (walked > index + 1) & (channel < K))
            later_sums = other_sums
            carry = tl.where(forgets, 0.0, carry - sums)
            walked = tl.where(forgets, index, walked)
            tl.store(through_ptr + here, carry, mask=channel < K)
            carry += other_sums
        else:
            tl.store(sums_ptr + here, sums, mask=channel < K)
        read = tl.trans(out).to(operands.out_ptr.dtype.element_ty)
        store_chunk(out_view, read, start, column, last, out_row, K, C, BK, DESCRIPTORS)
    return state, carry, walked, later_sums


@triton.jit
def _pairing(states_ptr, d_state, k_first, dtype: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """S D summed over V, of the D [BK, BV] that a sweep holds."""
    state, mask = state_tile(states_ptr, k_first, 0, K, V, V, 1, d_state.shape[0], d_state.shape[1])
    swept = as_swept(d_state, dtype == tl.bfloat16)
    return tl.sum(tl.load(state, mask=mask, other=0.0) * swept, 1)


@triton.jit
def _tie(through_ptr, drift, walked, first, last, k_first, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr):
    """Takes `drift`, what dg at the segment's start is off by, from what passes through the first `walked` of its
    chunks but the first, in proportion."""
    chunks = tl.cdiv(last - first, C)
    channel = k_first + tl.arange(0, BK)[None, :]
    for block in range(tl.cdiv(chunks, TIED)):
        chunk = block * TIED + tl.arange(0, TIED)[:, None]
        here = through_ptr + (tl.cast(first // C, tl.int64) + chunk) * K + channel
        mask = (chunk > 0) & (chunk < walked[None, :]) & (channel < K)
        share = (walked[None, :] - 0.5 - chunk.to(tl.float32)) / walked[None, :]
        tl.store(here, tl.load(here, mask=mask, other=0.0) - share * drift[None, :], mask=mask)


@triton.jit(do_not_specialize=["T", "H_g", "H_v", "segments", "segment_chunks", "chunks"])
def channel_query_inter_chunk_kernel(
    from_start_ptr,  # [B, T, H_g, K]: scale q 2^prefix
    to_end_ptr,  # [B, T, H_g, K]: k 2^suffix
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    totals_ptr,  # fp32 [B, H_g, chunks, K]
    read_q_ptr,  # [B, T, H_v, K], written
    sums_ptr,  # fp32 [B, H_v, chunks, K], written
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
        totals_ptr=totals_ptr, out_ptr=read_q_ptr, sums_ptr=sums_ptr, through_ptr=sums_ptr,
    )  # fmt: skip
    _sweep(
        operands, here, state, tl.zeros((BK,), tl.float32), False, False, k_first, T, H_g, H_v, chunks,
        K=K, V=V, BK=BK, BV=BV, C=C, REVERSE=False, FORGETS=0.0, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H_g", "H_v", "segments", "segment_chunks", "chunks"])
def channel_key_inter_chunk_kernel(
    from_start_ptr,  # [B, T, H_g, K]: scale q 2^prefix
    to_end_ptr,  # [B, T, H_g, K]: k 2^suffix
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    totals_ptr,  # fp32 [B, H_g, chunks, K]
    read_k_ptr,  # [B, T, H_v, K], written
    sums_ptr,  # fp32 [B, H_v, chunks, K], as the other sweep left them
    through_ptr,  # fp32 [B, H_v, chunks, K], written: what passes through each chunk adds to dg
    states_ptr,  # fp32 [B, H_v, segments, K, V]: entering each segment; not read if WHOLE
    state_out_ptr,  # fp32 [B, H_v, K, V]: leaving the run
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
    FORGETS: tl.constexpr,  # what is less than rounding changes, base 2, see `beyond_one`
    FROM_ZERO: tl.constexpr,  # whether no run has an initial state
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    here, index, k_first = sweep_place(places_ptr, segments, segment_chunks, T, H_v, K, BK, C, PACKED)
    state, _, _ = segment_border(
        d_states_ptr, after_ptr, d_state_out_ptr, index, here.border, channel_tile(k_first, 0, K, V), BK, BV, WHOLE
    )
    end_ptr = state_out_ptr + here.border * K * V
    if not WHOLE:
        end_ptr = tl.where(here.ends, end_ptr, states_ptr + (index + 1) * K * V)
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    carry = _pairing(end_ptr, state, k_first, dtype, K, V)
    begin, _ = run_bounds(places_ptr, T, PACKED)
    from_nothing = (here.first == begin) & FROM_ZERO
    to_nothing = here.ends & (d_state_out_ptr is None)
    operands = KeyOperands(
        a_ptr=v_ptr, b_ptr=do_ptr, c_ptr=from_start_ptr, x_ptr=to_end_ptr,
        totals_ptr=totals_ptr, out_ptr=read_k_ptr, sums_ptr=sums_ptr, through_ptr=through_ptr,
    )  # fmt: skip
    state, carry, walked, first_sums = _sweep(
        operands, here, state, carry, from_nothing, to_nothing, k_first, T, H_g, H_v, chunks,
        K=K, V=V, BK=BK, BV=BV, C=C, REVERSE=True, FORGETS=FORGETS, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
    )  # fmt: skip
    through_ptr += _first_chunk(here, H_v, chunks, K, C)
    drift = carry
    if not WHOLE:  # else nothing enters
        start = _pairing(states_ptr + index * K * V, state, k_first, dtype, K, V)
        drift -= start
    # Other threads read what these have stored.
    tl.debug_barrier()
    if not WHOLE:
        channel = k_first + tl.arange(0, BK)
        at = through_ptr + tl.cast(here.first // C, tl.int64) * K + channel
        tl.store(at, start - first_sums, mask=(walked > 0) & (channel < K))
    _tie(through_ptr, drift, walked, here.first, here.last, k_first, K, BK, C)
