"""The gradient of q, in forward order: it needs nothing of other ranks, so it hides the backward exchange."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import state_tile
from lasp.kernels.triton.decay.scalar_sweep import scalar_sweep
from lasp.kernels.triton.decay.sweep import place, sweep


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "segments", "segment_chunks"])
def query_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v], [B, T, H_v] or unused
    prefix_ptr,  # fp32 [B, H_v, T] or unused
    suffix_ptr,  # likewise
    dq_ptr,  # [B, T, H_v, K], written
    terms_ptr,  # fp32 [slices, B, H_v, T], written if DECAY_GRADIENT
    states_ptr,  # fp32 [B, H_v, segments, K, V], those entering each segment
    scale,
    B,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # columns of dq a program has
    BV: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
    EXACT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (K + BK - 1) // BK
    part, head, batch, segment, first, last = place(slices, segment_chunks, T, H_v, C)
    k_first = part * BK
    run = tl.cast(batch, tl.int64) * H_v + head
    states_ptr += (run * segments + segment) * K * V
    row = tl.cast(batch, tl.int64) * T
    q_ptr += (row * H + head // (H_v // H)) * K
    k_ptr += (row * H + head // (H_v // H)) * K
    token_head = row * H_v + head
    if DECAY_GRADIENT:
        terms = terms_ptr + (tl.cast(part, tl.int64) * B * H_v + run) * T
        entering, mask = state_tile(states_ptr, 0, k_first, V, K, 1, V, BV, BK)
        scalar_sweep(
            do_ptr + token_head * V, v_ptr + token_head * V, k_ptr, dq_ptr + token_head * K, q_ptr,
            g_ptr, prefix_ptr + run * T, suffix_ptr + run * T, terms, terms, 0.0,
            tl.load(entering, mask=mask, other=0.0),
            H_v * V, H_v * V, H * K, H_v * K, scale, T, H_v, batch, head, first, last, k_first,
            V, K, BV, BK, C, KIND, False, EXACT, DESCRIPTORS, PRECISION,
        )  # fmt: skip
    else:
        entering, mask = state_tile(states_ptr, k_first, 0, K, V, V, 1, BK, BV)
        sweep(
            do_ptr + token_head * V, v_ptr + token_head * V, k_ptr, dq_ptr + token_head * K,
            g_ptr, prefix_ptr + run * T, suffix_ptr + run * T,
            tl.load(entering, mask=mask, other=0.0),
            H_v * V, H_v * V, H * K, H_v * K, scale, T, H_v, batch, head, first, last, k_first,
            V, K, BV, BK, C, KIND, False, EXACT, DESCRIPTORS, PRECISION,
        )  # fmt: skip
