"""Outputs and the gradient of v for a gate per channel: sweeps whose state is contracted over the gated channels.

o_i  = scale (q_i 2^prefix_i) S + scale sum_{j <= i} scores_ij v_j
dv_j =       (k_j 2^suffix_j) D + scale sum_{i >= j} scores_ij do_i
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import place
from lasp.kernels.triton.common.tiles import load_chunk, state_tile, store_chunk, view
from lasp.kernels.triton.decay.channel.decays import segment_border


@triton.jit
def _sweep(
    a_ptr,  # scale q 2^prefix, or k 2^suffix when REVERSE: the rows that read the state
    b_ptr,  # the other of the two: the rows that feed it
    c_ptr,  # v, or do
    totals_ptr,  # fp32 [chunks, K]
    scores_ptr,
    out_ptr,
    state,
    a_row,
    c_row,
    scale,
    first,
    last,
    column,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    a_view = view(a_ptr, last, a_row, K, C, BK, DESCRIPTORS)
    b_view = view(b_ptr, last, a_row, K, C, BK, DESCRIPTORS)
    c_view = view(c_ptr, last, c_row, V, C, BV, DESCRIPTORS)
    scores_view = view(scores_ptr, last, C, C, C, C, DESCRIPTORS)
    out_view = view(out_ptr, last, c_row, V, C, BV, DESCRIPTORS)
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
        store_chunk(out_view, out.to(out_ptr.dtype.element_ty), start, column, last, c_row, V, C, BV, DESCRIPTORS)
        state = tl.dot(tl.trans(b), c, state * tl.exp2(total)[:, None], input_precision=PRECISION)
    return state


@triton.jit(do_not_specialize=["scale", "T", "H_v", "segments", "segment_chunks", "chunks"])
def channel_output_kernel(
    q_ptr,  # [B, T, H_v, K], as channel_prepare wrote them
    k_ptr,  # likewise
    v_ptr,  # [B, T, H_v, V]
    totals_ptr,  # fp32 [B, H_v, chunks, K]
    scores_ptr,  # [B, H_v, T, C]
    o_ptr,  # [B, T, H_v, V], written
    states_ptr,  # fp32 [B, H_v, segments, K, V] from zero; replaced by those from state_in; not read if WHOLE
    before_ptr,  # fp32 [B, H_v, segments, K]: decay from the run's start to each segment; not read if WHOLE
    state_out_ptr,  # fp32 [B, H_v, K, V], written
    places_ptr,  # int32 [segments, 7] if PACKED
    state_in_ptr,  # fp32 [B, H_v, K, V], or None for zero
    scale,
    T,
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
    slices: tl.constexpr = (V + BV - 1) // BV
    part, head, batch, segment, first, last, chunk, border, ends = place(
        places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED
    )
    v_first = part * BV
    run = tl.cast(batch, tl.int64) * H_v + head
    index = run * segments + segment
    state, entering, mask = segment_border(
        states_ptr, before_ptr, state_in_ptr, index, border, 0, v_first, K, V, BK, BV, WHOLE
    )  # fmt: skip
    if state_in_ptr is not None:
        # A tile smaller than the program is held by several threads: none may store before all have loaded.
        tl.debug_barrier()
        tl.store(entering, state, mask=mask)
    row = tl.cast(batch, tl.int64) * T
    token_head = row * H_v + head
    state = _sweep(
        q_ptr + token_head * K, k_ptr + token_head * K, v_ptr + token_head * V,
        totals_ptr + (run * chunks + chunk - first // C) * K, scores_ptr + run * T * C,
        o_ptr + token_head * V, state, H_v * K, H_v * V, scale, first, last, v_first,
        K, V, BK, BV, C, False, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    if ends:
        leaving, _ = state_tile(state_out_ptr + border * K * V, 0, v_first, K, V, V, 1, BK, BV)
        tl.store(leaving, state, mask=mask)


@triton.jit(do_not_specialize=["scale", "T", "H_v", "segments", "segment_chunks", "chunks"])
def channel_value_gradient_kernel(
    q_ptr,  # [B, T, H_v, K], as channel_prepare wrote them
    k_ptr,  # likewise
    do_ptr,  # [B, T, H_v, V]
    totals_ptr,  # fp32 [B, H_v, chunks, K]
    scores_ptr,  # [B, H_v, T, C]
    dv_ptr,  # [B, T, H_v, V], written
    d_states_ptr,  # fp32 [B, H_v, segments, K, V]: gradients of states leaving each segment, from zero; see WHOLE
    after_ptr,  # fp32 [B, H_v, segments, K]: decay from each segment to the run's end; see WHOLE
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # fp32 [B, H_v, K, V], or None for zero
    scale,
    T,
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
    slices: tl.constexpr = (V + BV - 1) // BV
    part, head, batch, segment, first, last, chunk, border, _ = place(
        places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED
    )
    v_first = part * BV
    run = tl.cast(batch, tl.int64) * H_v + head
    index = run * segments + segment
    state, _, _ = segment_border(
        d_states_ptr, after_ptr, d_state_out_ptr, index, border, 0, v_first, K, V, BK, BV, WHOLE
    )  # fmt: skip
    row = tl.cast(batch, tl.int64) * T
    token_head = row * H_v + head
    _sweep(
        k_ptr + token_head * K, q_ptr + token_head * K, do_ptr + token_head * V,
        totals_ptr + (run * chunks + chunk - first // C) * K, scores_ptr + run * T * C,
        dv_ptr + token_head * V, state, H_v * K, H_v * V, scale, first, last, v_first,
        K, V, BK, BV, C, True, DESCRIPTORS, PRECISION,
    )  # fmt: skip
