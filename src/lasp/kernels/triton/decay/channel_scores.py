"""Scores inside a chunk for a gate per channel, and their gradients.

    scores_ij = sum_K q_i k_j 2^between(i, j), j <= i

is no plain product of q and k, and splitting 2^between(i, j) over a common reference would overflow. But two tokens
always meet at one power of two: there is one `half` such that j is in the early half and i in the late half of a
block of 2 half tokens, and its middle lies between them, so that both decays to the middle are <= 1:

    2^between(i, j) = 2^(from the middle to i) 2^(from j to the middle).

So the scores are log2(C) products, each masked to the pairs that meet there, and the diagonal. Chunks are
independent: nothing here needs a state or another rank, so it runs while the exchange is under way.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_chunk, store_chunk, view
from lasp.kernels.triton.decay.channel_gates import load_channel_gates, meeting_decay, meeting_pairs


@triton.jit(do_not_specialize=["T", "H", "H_v"])
def channel_scores_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    g_ptr,  # [B, T, H_v, K]
    scores_ptr,  # [B, H_v, T, C], written
    T,
    H,
    H_v,
    K: tl.constexpr,
    BK: tl.constexpr,  # channels at a time
    C: tl.constexpr,
    LEVELS: tl.constexpr,  # log2(C)
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    first = tl.program_id(1) * C
    head = tl.program_id(0) % H_v
    batch = tl.program_id(0) // H_v
    row = tl.cast(batch, tl.int64) * T
    q_view = view(q_ptr + (row * H + head // (H_v // H)) * K, T, H * K, K, C, BK, DESCRIPTORS)
    k_view = view(k_ptr + (row * H + head // (H_v // H)) * K, T, H * K, K, C, BK, DESCRIPTORS)
    g_view = view(g_ptr + (row * H_v + head) * K, T, H_v * K, K, C, BK, DESCRIPTORS)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    scores = tl.zeros((C, C), tl.float32)
    for k_first in range(0, K, BK):
        q = load_chunk(q_view, first, k_first, T, H * K, K, C, BK, DESCRIPTORS)
        k = load_chunk(k_view, first, k_first, T, H * K, K, C, BK, DESCRIPTORS)
        gates = load_channel_gates(g_view, first, T, k_first, T, H_v * K, K, C, BK, DESCRIPTORS)
        scores += tl.where(i == j, tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
        for level in range(LEVELS):
            decay = meeting_decay(gates, 1 << level, dtype, C)
            met = tl.dot((q * decay).to(dtype), tl.trans((k * decay).to(dtype)), input_precision=PRECISION)
            scores += tl.where(meeting_pairs(i, j, 1 << level), met, 0.0)
    run = row * H_v + tl.cast(head, tl.int64) * T
    out = view(scores_ptr + run * C, T, C, C, C, C, DESCRIPTORS)
    store_chunk(out, scores.to(dtype), first, 0, T, C, C, C, C, DESCRIPTORS)


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v"])
def channel_scores_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [B, T, H_v, K]
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
    for level in range(LEVELS):
        decay = meeting_decay(gates, 1 << level, dtype, C)
        met = tl.where(meeting_pairs(i, j, 1 << level), d_scores, 0.0).to(dtype)
        met_t = tl.where(meeting_pairs(j, i, 1 << level), d_scores_t, 0.0).to(dtype)
        dq += decay * tl.dot(met, (k * decay).to(dtype), input_precision=PRECISION)
        dk += decay * tl.dot(met_t, (q * decay).to(dtype), input_precision=PRECISION)
    # A token decays nothing between itself and itself: the diagonal is no part of the gate's gradient.
    dg = tl.cumsum(q * dq - k * dk, 0, reverse=True)
    dq += diagonal * k
    dk += diagonal * q
    out = token_head * K
    dq_view = view(dq_ptr + out, T, H_v * K, K, C, BK, DESCRIPTORS)
    dk_view = view(dk_ptr + out, T, H_v * K, K, C, BK, DESCRIPTORS)
    dg_view = view(dg_ptr + out, T, H_v * K, K, C, BK, DESCRIPTORS)
    store_chunk(dq_view, dq.to(dq_ptr.dtype.element_ty), first, k_first, T, H_v * K, K, C, BK, DESCRIPTORS)
    store_chunk(dk_view, dk.to(dk_ptr.dtype.element_ty), first, k_first, T, H_v * K, K, C, BK, DESCRIPTORS)
    store_chunk(dg_view, dg, first, k_first, T, H_v * K, K, C, BK, DESCRIPTORS)
