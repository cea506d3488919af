"""The gradient of q, in forward order: it needs nothing of other ranks, so it hides the backward exchange."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import state_tile
from lasp.kernels.triton.decay.gates import head_rate
from lasp.kernels.triton.decay.sweep import place, sweep


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "batch_tokens"])
def query_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v], [B, T, H_v] or unused
    dq_ptr,  # [B, T, H_v, K], written
    states_ptr,  # fp32 [B, H_v, segments, K, V], those entering each segment
    terms_ptr,  # fp32 [slices, B, T, H_v], written if DECAY_GRADIENT
    scale,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    batch_tokens,  # B * T
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # columns of dq a program has
    BV: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (K + BK - 1) // BK
    part, head, batch, segment, row, tokens = place(slices, segment_chunks, T, H_v, C)
    k_first = part * BK
    run = tl.cast(batch, tl.int64) * H_v + head
    entering, mask = state_tile(states_ptr + (run * segments + segment) * K * V, k_first, 0, K, V, BK, BV, True)
    state = tl.load(entering, mask=mask, other=0.0)

    qk = (row * H + head // (H_v // H)) * K + k_first
    token_head = row * H_v + head
    dq_out = dq_ptr + token_head * K + k_first
    terms = terms_ptr + (tl.cast(part, tl.int64) * batch_tokens * H_v + token_head)
    sweep(
        do_ptr + token_head * V, v_ptr + token_head * V, k_ptr + qk, dq_out, g_ptr + token_head,
        H_v * V, H_v * V, H * K, H_v * K, H_v,
        q_ptr + qk, terms, terms, 0.0,
        state, head_rate(g_ptr, head, KIND), scale, tokens, K - k_first,
        V, BV, BK, K % BK == 0, C, KIND, False, DECAY_GRADIENT, EXACT, PRECISION,
    )  # fmt: skip
