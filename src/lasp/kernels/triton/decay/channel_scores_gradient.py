"""The gradients of the scores within chunks for a gate per channel, level by level as in channel_prepare."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_chunk, store_chunk, view
from lasp.kernels.triton.decay.channel_gates import (
    load_channel_gates,
    load_meeting,
    meeting_decay,
    split_gates,
    sums_to_end,
)


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v"])
def channel_scores_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [B, T, H_v, K]
    meeting_ptr,  # [LEVELS, 2, C, C]
    dq_ptr,  # [B, T, H_v, K], written: what tokens of the same chunk give
    dk_ptr,  # likewise
    dg_ptr,  # fp32 likewise
    scale,
    T,
    H,
    H_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # channels a program has
    BV: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    slices: tl.constexpr = (K + BK - 1) // BK
    k_first = (tl.program_id(0) % slices) * BK
    head = tl.program_id(0) // slices % H_v
    batch = tl.program_id(0) // slices // H_v
    first = tl.program_id(1) * C
    row = tl.cast(batch, tl.int64) * T
    qk = (row * H + head // (H_v // H)) * K
    token_head = row * H_v + head
    q_view = view(q_ptr + qk, T, H * K, K, C, BK, DESCRIPTORS)
    k_view = view(k_ptr + qk, T, H * K, K, C, BK, DESCRIPTORS)
    v_view = view(v_ptr + token_head * V, T, H_v * V, V, C, BV, DESCRIPTORS)
    do_view = view(do_ptr + token_head * V, T, H_v * V, V, C, BV, DESCRIPTORS)
    g_view = view(g_ptr + token_head * K, T, H_v * K, K, C, BK, DESCRIPTORS)

    v = load_chunk(v_view, first, 0, T, H_v * V, V, C, BV, DESCRIPTORS)
    do = load_chunk(do_view, first, 0, T, H_v * V, V, C, BV, DESCRIPTORS)
    q = load_chunk(q_view, first, k_first, T, H * K, K, C, BK, DESCRIPTORS)
    k = load_chunk(k_view, first, k_first, T, H * K, K, C, BK, DESCRIPTORS)
    gates = load_channel_gates(g_view, first, T, k_first, T, H_v * K, K, C, BK, DESCRIPTORS)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    # The transpose is a product of its own: see docs/kernels.md on transposed accumulators.
    d_scores = tl.dot(do, tl.trans(v), input_precision=PRECISION) * scale
    d_scores_t = tl.dot(v, tl.trans(do), input_precision=PRECISION) * scale
    diagonal = tl.sum(tl.where(i == j, d_scores, 0.0), 1)[:, None]
    dq = tl.zeros((C, BK), tl.float32)
    dk = tl.zeros((C, BK), tl.float32)
    high, low = split_gates(gates, dtype)
    for level in range(LEVELS):
        stretches, pairs = load_meeting(meeting_ptr, level, C)
        pairs_t = tl.load(meeting_ptr + (2 * level + 1) * C * C + j * C + i)
        decay = meeting_decay(high, low, stretches, dtype)
        met = (d_scores * pairs).to(dtype)
        met_t = (d_scores_t * pairs_t).to(dtype)
        dq += decay * tl.dot(met, (k * decay).to(dtype), input_precision=PRECISION)
        dk += decay * tl.dot(met_t, (q * decay).to(dtype), input_precision=PRECISION)
    # A token decays nothing between itself and itself: the diagonal is no part of the gate's gradient.
    dg = sums_to_end(q * dq - k * dk, dtype, C)
    dq += diagonal * k
    dk += diagonal * q
    out = token_head * K
    dq_view = view(dq_ptr + out, T, H_v * K, K, C, BK, DESCRIPTORS)
    dk_view = view(dk_ptr + out, T, H_v * K, K, C, BK, DESCRIPTORS)
    dg_view = view(dg_ptr + out, T, H_v * K, K, C, BK, DESCRIPTORS)
    store_chunk(dq_view, dq.to(dq_ptr.dtype.element_ty), first, k_first, T, H_v * K, K, C, BK, DESCRIPTORS)
    store_chunk(dk_view, dk.to(dk_ptr.dtype.element_ty), first, k_first, T, H_v * K, K, C, BK, DESCRIPTORS)
    store_chunk(dg_view, dg, first, k_first, T, H_v * K, K, C, BK, DESCRIPTORS)
