# mypy: ignore-errors
"""Outputs and the gradient of v for a gate per channel: sweeps whose state is contracted over the gated channels.

o_i  = scale (q_i 2^prefix_i) S + scale sum_{j <= i} scores_ij v_j
dv_j =       (k_j 2^suffix_j) D + scale sum_{i >= j} scores_ij do_i
"""

from typing import NamedTuple

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import decayed
from lasp.kernels.triton.common.program import load_chunk, rows_of, store_chunk, sweep_place, tile_at, view
from lasp.kernels.triton.decay.channel.decays import channel_tile, gate_heads_of, segment_border


class ValueOperands(NamedTuple):
    """The rows of a sweep, of all batches and heads.

    Attributes:
        a_ptr: [B, T, H_g, K], scale q 2^prefix, or k 2^suffix when REVERSE: the rows that read the state.
        b_ptr: the other of the two: the rows that feed it.
        c_ptr: [B, T, H_v, V], v, or do.
        totals_ptr: fp32 [B, H_g, chunks, K].
        scores_ptr: [B, H_g, T, C].
        out_ptr: [B, T, H_v, V], written.
    """

    a_ptr: tl.tensor
    b_ptr: tl.tensor
    c_ptr: tl.tensor
    totals_ptr: tl.tensor
    scores_ptr: tl.tensor
    out_ptr: tl.tensor


@triton.jit
def _sweep(
    operands,
    here,
    state,
    column,
    scale,
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
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = operands.a_ptr.dtype.element_ty
    first = here.first
    last = here.last
    run, gate_row = gate_heads_of(here, T, H_g, H_v)
    _, token_head = rows_of(here, T, H_v, H_v)
    a_row = H_g * K
    c_row = H_v * V
    totals_ptr = operands.totals_ptr + (run * chunks_of_run + here.chunk - first // C) * K
    a_view = view(operands.a_ptr + gate_row * K, last, a_row, K, C, BK, DESCRIPTORS)
    b_view = view(operands.b_ptr + gate_row * K, last, a_row, K, C, BK, DESCRIPTORS)
    c_view = view(operands.c_ptr + token_head * V, last, c_row, V, C, BV, DESCRIPTORS)
    scores_view = view(operands.scores_ptr + run * T * C, last, C, C, C, C, DESCRIPTORS)
    out_view = view(operands.out_ptr + token_head * V, last, c_row, V, C, BV, DESCRIPTORS)
    channel = tl.arange(0, BK)
    chunks = tl.cdiv(last - first, C)
    for step in range(chunks):
        start = first + (chunks - 1 - step if REVERSE else step) * C
        a = load_chunk(a_view, start, 0, last, a_row, K, C, BK, DESCRIPTORS)
        b = load_chunk(b_view, start, 0, last, a_row, K, C, BK, DESCRIPTORS)
        c = load_chunk(c_view, start, column, last, c_row, V, C, BV, DESCRIPTORS)
        scores = load_chunk(scores_view, start, 0, last, C, C, C, C, DESCRIPTORS)
        # Loaded first, used last.
        total = tl.load(totals_ptr + tl.cast(start // C, tl.int64) * K + channel, mask=channel < K, other=0.0)
        if REVERSE:
            inside = tl.dot(tl.trans(scores), c, input_precision=PRECISION)
        else:
            inside = tl.dot(scores, c, input_precision=PRECISION)
        if dtype == tl.bfloat16:
            read = tl.dot(a, state.to(tl.bfloat16))
        else:
            read = tl.dot(a.to(tl.float32), state, input_precision=PRECISION)
        out = tl.fma(inside, scale, read)  # as in `rows`
        store_chunk(
            out_view, out.to(operands.out_ptr.dtype.element_ty), start, column, last, c_row, V, C, BV, DESCRIPTORS
        )
        state = decayed(state, total[:, None], dtype == tl.float32)
        state = tl.dot(tl.trans(b), c, state, input_precision=PRECISION)
    return state


@triton.jit(do_not_specialize=["scale", "T", "H_g", "H_v", "segments", "segment_chunks", "chunks"])
def channel_output_kernel(
    q_ptr,  # [B, T, H_g, K], as channel_prepare wrote them
    k_ptr,  # likewise
    v_ptr,  # [B, T, H_v, V]
    totals_ptr,  # fp32 [B, H_g, chunks, K]
    scores_ptr,  # [B, H_g, T, C]
    o_ptr,  # [B, T, H_v, V], written
    states_ptr,  # fp32 [B, H_v, segments, K, V] from zero; replaced by those from state_in; not read if WHOLE
    before_ptr,  # fp32 [B, H_v, segments, K]: decay from the run's start to each segment; not read if WHOLE
    state_out_ptr,  # fp32 [B, H_v, K, V], written
    places_ptr,  # int32 [segments, 7] if PACKED
    state_in_ptr,  # fp32 [B, H_v, K, V], or None for zero
    scale,
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
    WHOLE: tl.constexpr,  # a segment is a run, and starts from no state
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    here, index, v_first = sweep_place(places_ptr, segments, segment_chunks, T, H_v, V, BV, C, PACKED)
    state, entering, mask = segment_border(
        states_ptr, before_ptr, state_in_ptr, index, here.border, channel_tile(0, v_first, K, V), BK, BV, WHOLE
    )
    if state_in_ptr is not None:
        # A tile smaller than the program is held by several threads: none may store before all have loaded.
        tl.debug_barrier()
        tl.store(entering, state, mask=mask)
    operands = ValueOperands(
        a_ptr=q_ptr, b_ptr=k_ptr, c_ptr=v_ptr, totals_ptr=totals_ptr, scores_ptr=scores_ptr, out_ptr=o_ptr
    )
    state = _sweep(
        operands, here, state, v_first, scale, T, H_g, H_v, chunks,
        K=K, V=V, BK=BK, BV=BV, C=C, REVERSE=False, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
    )  # fmt: skip
    if here.ends:
        leaving, _ = tile_at(state_out_ptr + here.border * K * V, channel_tile(0, v_first, K, V), BK, BV)
        tl.store(leaving, state, mask=mask)


@triton.jit(do_not_specialize=["scale", "T", "H_g", "H_v", "segments", "segment_chunks", "chunks"])
def channel_value_gradient_kernel(
    q_ptr,  # [B, T, H_g, K], as channel_prepare wrote them
    k_ptr,  # likewise
    do_ptr,  # [B, T, H_v, V]
    totals_ptr,  # fp32 [B, H_g, chunks, K]
    scores_ptr,  # [B, H_g, T, C]
    dv_ptr,  # [B, T, H_v, V], written
    d_states_ptr,  # fp32 [B, H_v, segments, K, V]: gradients of states leaving each segment, from zero; see WHOLE
    after_ptr,  # fp32 [B, H_v, segments, K]: decay from each segment to the run's end; see WHOLE
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # fp32 [B, H_v, K, V], or None for zero
    scale,
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
    WHOLE: tl.constexpr,  # a segment is a run, and starts from no state
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    here, index, v_first = sweep_place(places_ptr, segments, segment_chunks, T, H_v, V, BV, C, PACKED)
    state, _, _ = segment_border(
        d_states_ptr, after_ptr, d_state_out_ptr, index, here.border, channel_tile(0, v_first, K, V), BK, BV, WHOLE
    )
    operands = ValueOperands(
        a_ptr=k_ptr, b_ptr=q_ptr, c_ptr=do_ptr, totals_ptr=totals_ptr, scores_ptr=scores_ptr, out_ptr=dv_ptr
    )
    _sweep(
        operands, here, state, v_first, scale, T, H_g, H_v, chunks,
        K=K, V=V, BK=BK, BV=BV, C=C, REVERSE=True, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
    )  # fmt: skip
