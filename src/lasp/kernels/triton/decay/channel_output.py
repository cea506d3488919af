"""Outputs and the gradient of v for a gate per channel: sweeps whose state is contracted over the gated channels.

o_i  = scale (q_i 2^prefix_i) S + scale sum_{j <= i} scores_ij v_j
dv_j =       (k_j 2^suffix_j) D + scale sum_{i >= j} scores_ij do_i
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_chunk, state_tile, store_chunk, view
from lasp.kernels.triton.decay.channel_gates import load_channel_gates, prefix_sums, suffix_sums
from lasp.kernels.triton.decay.sweep import place


@triton.jit
def _sweep(
    a_ptr,  # q, or k when REVERSE: the rows that read the state
    b_ptr,  # k, or q: the rows that feed it
    c_ptr,  # v, or do
    g_ptr,
    scores_ptr,
    out_ptr,
    state,
    a_row,
    c_row,
    g_row,
    scale,
    T,
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
    a_view = view(a_ptr, T, a_row, K, C, BK, DESCRIPTORS)
    b_view = view(b_ptr, T, a_row, K, C, BK, DESCRIPTORS)
    c_view = view(c_ptr, T, c_row, V, C, BV, DESCRIPTORS)
    g_view = view(g_ptr, T, g_row, K, C, BK, DESCRIPTORS)
    scores_view = view(scores_ptr, T, C, C, C, C, DESCRIPTORS)
    out_view = view(out_ptr, T, c_row, V, C, BV, DESCRIPTORS)
    chunks = tl.cdiv(last - first, C)
    for step in range(chunks):
        start = first + (chunks - 1 - step if REVERSE else step) * C
        a = load_chunk(a_view, start, 0, T, a_row, K, C, BK, DESCRIPTORS)
        b = load_chunk(b_view, start, 0, T, a_row, K, C, BK, DESCRIPTORS)
        c = load_chunk(c_view, start, column, T, c_row, V, C, BV, DESCRIPTORS)
        scores = load_chunk(scores_view, start, 0, T, C, C, C, C, DESCRIPTORS)
        gates = load_channel_gates(g_view, start, last, 0, T, g_row, K, C, BK, DESCRIPTORS)
        total = tl.sum(gates, 0)
        from_start = tl.exp2(prefix_sums(gates, dtype, C)) * scale
        to_end = tl.exp2(suffix_sums(gates, dtype, C))
        if REVERSE:
            reading = (a * to_end).to(dtype)
            feeding = (b * from_start).to(dtype)
            inside = tl.dot(tl.trans(scores), c, input_precision=PRECISION)
        else:
            reading = (a * from_start).to(dtype)
            feeding = (b * to_end).to(dtype)
            inside = tl.dot(scores, c, input_precision=PRECISION)
        if dtype == tl.bfloat16:
            out = tl.dot(reading, state.to(tl.bfloat16), inside * scale)
        else:
            out = tl.dot(reading.to(tl.float32), state, inside * scale, input_precision=PRECISION)
        store_chunk(out_view, out.to(out_ptr.dtype.element_ty), start, column, T, c_row, V, C, BV, DESCRIPTORS)
        state = tl.dot(tl.trans(feeding), c, state * tl.exp2(total)[:, None], input_precision=PRECISION)
    return state


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks"])
def channel_output_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    g_ptr,  # [B, T, H_v, K]
    scores_ptr,  # [B, H_v, T, C]
    o_ptr,  # [B, T, H_v, V], written
    states_ptr,  # fp32 [B, H_v, segments, K, V] from zero; replaced by those from state_in
    before_ptr,  # fp32 [B, H_v, segments, K]: decay from the run's start to each segment
    state_in_ptr,  # fp32 [B, H_v, K, V]
    state_out_ptr,  # fp32 [B, H_v, K, V], written
    scale,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (V + BV - 1) // BV
    part, head, batch, segment, first, last = place(slices, segment_chunks, T, H_v, C)
    v_first = part * BV
    run = tl.cast(batch, tl.int64) * H_v + head
    index = run * segments + segment
    channel = tl.arange(0, BK)
    before = tl.exp2(tl.load(before_ptr + index * K + channel, mask=channel < K, other=0.0))
    entering, mask = state_tile(states_ptr + index * K * V, 0, v_first, K, V, V, 1, BK, BV)
    outside, _ = state_tile(state_in_ptr + run * K * V, 0, v_first, K, V, V, 1, BK, BV)
    state = tl.load(entering, mask=mask, other=0.0) + before[:, None] * tl.load(outside, mask=mask, other=0.0)
    # A tile smaller than the program is held by several threads: none may store before all have loaded.
    tl.debug_barrier()
    tl.store(entering, state, mask=mask)
    row = tl.cast(batch, tl.int64) * T
    qk = (row * H + head // (H_v // H)) * K
    token_head = row * H_v + head
    state = _sweep(
        q_ptr + qk, k_ptr + qk, v_ptr + token_head * V, g_ptr + token_head * K, scores_ptr + run * T * C,
        o_ptr + token_head * V, state, H * K, H_v * V, H_v * K, scale, T, first, last, v_first,
        K, V, BK, BV, C, False, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    if segment == segments - 1:
        leaving, _ = state_tile(state_out_ptr + run * K * V, 0, v_first, K, V, V, 1, BK, BV)
        tl.store(leaving, state, mask=mask)


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks"])
def channel_value_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [B, T, H_v, K]
    scores_ptr,  # [B, H_v, T, C]
    dv_ptr,  # [B, T, H_v, V], written
    d_states_ptr,  # fp32 [B, H_v, segments, K, V]: gradients of states leaving each segment, from zero
    after_ptr,  # fp32 [B, H_v, segments, K]: decay from each segment to the run's end
    d_state_out_ptr,  # fp32 [B, H_v, K, V]
    scale,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (V + BV - 1) // BV
    part, head, batch, segment, first, last = place(slices, segment_chunks, T, H_v, C)
    v_first = part * BV
    run = tl.cast(batch, tl.int64) * H_v + head
    index = run * segments + segment
    channel = tl.arange(0, BK)
    after = tl.exp2(tl.load(after_ptr + index * K + channel, mask=channel < K, other=0.0))
    inside, mask = state_tile(d_states_ptr + index * K * V, 0, v_first, K, V, V, 1, BK, BV)
    outside, _ = state_tile(d_state_out_ptr + run * K * V, 0, v_first, K, V, V, 1, BK, BV)
    state = tl.load(inside, mask=mask, other=0.0) + after[:, None] * tl.load(outside, mask=mask, other=0.0)
    row = tl.cast(batch, tl.int64) * T
    qk = (row * H + head // (H_v // H)) * K
    token_head = row * H_v + head
    _sweep(
        k_ptr + qk, q_ptr + qk, do_ptr + token_head * V, g_ptr + token_head * K, scores_ptr + run * T * C,
        dv_ptr + token_head * V, state, H * K, H_v * V, H_v * K, scale, T, first, last, v_first,
        K, V, BK, BV, C, True, DESCRIPTORS, PRECISION,
    )  # fmt: skip
