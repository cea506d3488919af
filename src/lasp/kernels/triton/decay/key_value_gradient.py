"""The gradients of k, v and g, in reverse order.

Programs of two roles in one launch, side by side so that what both read comes from the cache once: the first
slices_k have BK columns of dk, the others BV columns of dv.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import state_tile
from lasp.kernels.triton.decay.gates import head_rate
from lasp.kernels.triton.decay.sweep import place, sweep


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "batch_tokens"])
def key_value_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v], [B, T, H_v] or unused
    dk_ptr,  # [B, T, H_v, K], written
    dv_ptr,  # [B, T, H_v, V], written
    terms_ptr,  # fp32 [slices_k, B, T, H_v], as the sweep of dq left them
    dg_ptr,  # fp32 [slices_k, B, T, H_v], written if DECAY_GRADIENT
    states_ptr,  # fp32 [B, H_v, segments, K, V]: entering each segment
    state_out_ptr,  # fp32 [B, H_v, K, V]: leaving the run
    d_states_ptr,  # fp32 [B, H_v, segments, K, V]: gradients of those leaving each segment, from zero
    after_ptr,  # fp32 [B, H_v, segments]: decay from each segment to the run's end
    d_state_out_ptr,  # fp32 [B, H_v, K, V]
    scale,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    batch_tokens,  # B * T
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PK: tl.constexpr,  # K and V as whole tiles
    PV: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROLE: tl.constexpr = 0,
):
    slices_k: tl.constexpr = (K + BK - 1) // BK if ROLE != 2 else 0
    slices_v: tl.constexpr = (V + BV - 1) // BV if ROLE != 1 else 0
    part, head, batch, segment, row, tokens = place(slices_k + slices_v, segment_chunks, T, H_v, C)
    run = tl.cast(batch, tl.int64) * H_v + head
    d_states_ptr += (run * segments + segment) * K * V
    d_state_out_ptr += run * K * V
    after = tl.exp2(tl.load(after_ptr + run * segments + segment))
    rate = head_rate(g_ptr, head, KIND)
    token_head = row * H_v + head
    qk = (row * H + head // (H_v // H)) * K
    if ROLE == 1 or (ROLE == 0 and part < slices_k):
        k_first = part * BK
        inside, mask = state_tile(d_states_ptr, k_first, 0, K, V, BK, PV, True)
        outside, _ = state_tile(d_state_out_ptr, k_first, 0, K, V, BK, PV, True)
        state = tl.load(inside, mask=mask, other=0.0) + after * tl.load(outside, mask=mask, other=0.0)
        carry = 0.0
        if DECAY_GRADIENT:
            end_ptr = states_ptr + (run * segments + segment + 1) * K * V
            if segment == segments - 1:
                end_ptr = state_out_ptr + run * K * V
            end, _ = state_tile(end_ptr, k_first, 0, K, V, BK, PV, True)
            carry = tl.sum(tl.load(end, mask=mask, other=0.0) * state)
        partial = tl.cast(part, tl.int64) * batch_tokens * H_v + token_head
        sweep(
            v_ptr + token_head * V, do_ptr + token_head * V, q_ptr + qk + k_first,
            dk_ptr + token_head * K + k_first, g_ptr + token_head,
            H_v * V, H_v * V, H * K, H_v * K, H_v,
            k_ptr + qk + k_first, terms_ptr + partial, dg_ptr + partial, carry,
            state, rate, scale, tokens, K - k_first,
            V, PV, BK, K % BK == 0, C, KIND, True, DECAY_GRADIENT, EXACT, PRECISION,
        )  # fmt: skip
    else:
        v_first = (part - slices_k) * BV
        inside, mask = state_tile(d_states_ptr, 0, v_first, K, V, PK, BV, False)
        outside, _ = state_tile(d_state_out_ptr, 0, v_first, K, V, PK, BV, False)
        state = tl.load(inside, mask=mask, other=0.0) + after * tl.load(outside, mask=mask, other=0.0)
        vo = token_head * V + v_first
        sweep(
            k_ptr + qk, q_ptr + qk, do_ptr + vo, dv_ptr + vo, g_ptr + token_head,
            H * K, H * K, H_v * V, H_v * V, H_v,
            k_ptr, terms_ptr, dg_ptr, 0.0,
            state, rate, scale, tokens, V - v_first,
            K, PK, BV, V % BV == 0, C, KIND, True, False, EXACT, PRECISION,
        )  # fmt: skip
