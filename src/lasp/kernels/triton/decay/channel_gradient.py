"""The gradients of q, k and the gate for a gate per channel: sweeps of a slice of channels, all of V contracted.

    dq_i = dq_i within the chunk + scale 2^prefix_i (S do_i)
    dk_j = dk_j within the chunk +       2^suffix_j (D v_j)
    dg_t = sum_{s >= t} (q_s dq_s - k_s dk_s) + (S_end D_end summed over V)     per channel, within a segment

The part of dg from pairs within a chunk is there already (channel_scores); here each sweep adds what its state gives,
summed from the chunk's end, and that of dk also what later chunks of the segment give: their own sums, and those
of the sweep of dq, which it left per chunk.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_chunk, state_tile, store_chunk, view
from lasp.kernels.triton.decay.channel_gates import load_channel_gates, prefix_sums, suffix_sums, sums_to_end
from lasp.kernels.triton.decay.sweep import place


@triton.jit
def _sweep(
    a_ptr,  # do, or v when REVERSE: [T, V] rows that read the state
    b_ptr,  # v, or do: the rows that feed it
    c_ptr,  # k 2^suffix, or scale q 2^prefix: [T, K] rows that feed it
    x_ptr,  # q, or k: whose gradient this is
    g_ptr,
    out_ptr,  # holds the gradient within chunks; the state's part is added
    dg_ptr,  # likewise
    sums_ptr,  # fp32 [chunks, K]: q dq from the state summed over each chunk; written, or read when REVERSE
    state,  # [BV, BK]
    carry,  # [BK]
    a_row,
    x_row,
    out_row,
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
    a_view = view(a_ptr, T, a_row, V, C, BV, DESCRIPTORS)
    b_view = view(b_ptr, T, a_row, V, C, BV, DESCRIPTORS)
    c_view = view(c_ptr, T, out_row, K, C, BK, DESCRIPTORS)
    x_view = view(x_ptr, T, x_row, K, C, BK, DESCRIPTORS)
    g_view = view(g_ptr, T, out_row, K, C, BK, DESCRIPTORS)
    out_view = view(out_ptr, T, out_row, K, C, BK, DESCRIPTORS)
    dg_view = view(dg_ptr, T, out_row, K, C, BK, DESCRIPTORS)
    channel = column + tl.arange(0, BK)
    chunks = tl.cdiv(last - first, C)
    for step in range(chunks):
        start = first + (chunks - 1 - step if REVERSE else step) * C
        a = load_chunk(a_view, start, 0, T, a_row, V, C, BV, DESCRIPTORS)
        b = load_chunk(b_view, start, 0, T, a_row, V, C, BV, DESCRIPTORS)
        c = load_chunk(c_view, start, column, T, out_row, K, C, BK, DESCRIPTORS)
        x = load_chunk(x_view, start, column, T, x_row, K, C, BK, DESCRIPTORS)
        gates = load_channel_gates(g_view, start, last, column, T, out_row, K, C, BK, DESCRIPTORS)
        within = load_chunk(out_view, start, column, T, out_row, K, C, BK, DESCRIPTORS)
        dg = load_chunk(dg_view, start, column, T, out_row, K, C, BK, DESCRIPTORS)
        total = tl.sum(gates, 0)
        if dtype == tl.bfloat16:
            out = tl.dot(a, state.to(tl.bfloat16))
        else:
            out = tl.dot(a.to(tl.float32), state, input_precision=PRECISION)
        sums = sums_ptr + tl.cast(start // C, tl.int64) * K + channel
        if REVERSE:
            out *= tl.exp2(suffix_sums(gates, dtype, C))
            own = x * out
            dg += carry[None, :] - sums_to_end(own, dtype, C)
            carry += tl.load(sums, mask=channel < K, other=0.0) - tl.sum(own, 0)
        else:
            out *= tl.exp2(prefix_sums(gates, dtype, C)) * scale
            own = x * out
            dg += sums_to_end(own, dtype, C)
            tl.store(sums, tl.sum(own, 0), mask=channel < K)
        out += within.to(tl.float32)
        store_chunk(out_view, out.to(out_ptr.dtype.element_ty), start, column, T, out_row, K, C, BK, DESCRIPTORS)
        store_chunk(dg_view, dg, start, column, T, out_row, K, C, BK, DESCRIPTORS)
        state = tl.dot(tl.trans(b), c, state * tl.exp2(total)[None, :], input_precision=PRECISION)


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks"])
def channel_query_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    to_end_ptr,  # [B, T, H_v, K]: k 2^suffix
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [B, T, H_v, K]
    dq_ptr,  # [B, T, H_v, K], within chunks; completed
    dg_ptr,  # fp32 likewise; added to
    sums_ptr,  # fp32 [B, H_v, chunks, K], written
    states_ptr,  # fp32 [B, H_v, segments, K, V], those entering each segment
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
    slices: tl.constexpr = (K + BK - 1) // BK
    part, head, batch, segment, first, last = place(slices, segment_chunks, T, H_v, C)
    k_first = part * BK
    run = tl.cast(batch, tl.int64) * H_v + head
    entering, mask = state_tile(states_ptr + (run * segments + segment) * K * V, 0, k_first, V, K, 1, V, BV, BK)
    row = tl.cast(batch, tl.int64) * T
    qk = (row * H + head // (H_v // H)) * K
    token_head = row * H_v + head
    _sweep(
        do_ptr + token_head * V, v_ptr + token_head * V, to_end_ptr + token_head * K, q_ptr + qk,
        g_ptr + token_head * K, dq_ptr + token_head * K, dg_ptr + token_head * K, sums_ptr + run * tl.cdiv(T, C) * K,
        tl.load(entering, mask=mask, other=0.0), tl.zeros((BK,), tl.float32),
        H_v * V, H * K, H_v * K, scale, T, first, last, k_first,
        K, V, BK, BV, C, False, DESCRIPTORS, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks"])
def channel_key_gradient_kernel(
    from_start_ptr,  # [B, T, H_v, K]: scale q 2^prefix
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [B, T, H_v, K]
    dk_ptr,  # [B, T, H_v, K], within chunks; completed
    dg_ptr,  # fp32 likewise; completed
    sums_ptr,  # fp32 [B, H_v, chunks, K], as the sweep of dq left them
    states_ptr,  # fp32 [B, H_v, segments, K, V]: entering each segment
    state_out_ptr,  # fp32 [B, H_v, K, V]: leaving the run
    d_states_ptr,  # fp32 [B, H_v, segments, K, V]: gradients of those leaving each segment, from zero
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
    slices: tl.constexpr = (K + BK - 1) // BK
    part, head, batch, segment, first, last = place(slices, segment_chunks, T, H_v, C)
    k_first = part * BK
    run = tl.cast(batch, tl.int64) * H_v + head
    index = run * segments + segment
    channel = k_first + tl.arange(0, BK)
    after = tl.exp2(tl.load(after_ptr + index * K + channel, mask=channel < K, other=0.0))
    inside, mask = state_tile(d_states_ptr + index * K * V, 0, k_first, V, K, 1, V, BV, BK)
    outside, _ = state_tile(d_state_out_ptr + run * K * V, 0, k_first, V, K, 1, V, BV, BK)
    state = tl.load(inside, mask=mask, other=0.0) + after[None, :] * tl.load(outside, mask=mask, other=0.0)
    end_ptr = states_ptr + (index + 1) * K * V
    if segment == segments - 1:
        end_ptr = state_out_ptr + run * K * V
    end, _ = state_tile(end_ptr, 0, k_first, V, K, 1, V, BV, BK)
    # Rounded as the sweep rounds it, so that what the last tokens add to the state cancels.
    rounded = state.to(tl.bfloat16).to(tl.float32) if v_ptr.dtype.element_ty == tl.bfloat16 else state
    carry = tl.sum(tl.load(end, mask=mask, other=0.0) * rounded, 0)
    row = tl.cast(batch, tl.int64) * T
    qk = (row * H + head // (H_v // H)) * K
    token_head = row * H_v + head
    _sweep(
        v_ptr + token_head * V, do_ptr + token_head * V, from_start_ptr + token_head * K, k_ptr + qk,
        g_ptr + token_head * K, dk_ptr + token_head * K, dg_ptr + token_head * K, sums_ptr + run * tl.cdiv(T, C) * K,
        state, carry, H_v * V, H * K, H_v * K, scale, T, first, last, k_first,
        K, V, BK, BV, C, True, DESCRIPTORS, PRECISION,
    )  # fmt: skip
