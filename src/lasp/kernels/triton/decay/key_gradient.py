"""The gradients of k and of the decay, in reverse order."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import state_tile
from lasp.kernels.triton.decay.scalar_sweep import scalar_sweep
from lasp.kernels.triton.decay.sweep import place, sweep


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "segments", "segment_chunks"])
def key_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v], [B, T, H_v] or unused
    prefix_ptr,  # fp32 [B, H_v, T] or unused
    suffix_ptr,  # likewise
    dk_ptr,  # [B, T, H_v, K], written
    terms_ptr,  # fp32 [slices, B, H_v, T], as the sweep of dq left them
    dg_ptr,  # fp32 [slices, B, H_v, T], written if DECAY_GRADIENT
    states_ptr,  # fp32 [B, H_v, segments, K, V]: entering each segment
    state_out_ptr,  # fp32 [B, H_v, K, V]: leaving the run
    d_states_ptr,  # fp32 [B, H_v, segments, K, V]: gradients of those leaving each segment, from zero
    after_ptr,  # fp32 [B, H_v, segments]: decay from each segment to the run's end
    d_state_out_ptr,  # fp32 [B, H_v, K, V]
    scale,
    B,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # columns of dk a program has
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
    d_states_ptr += (run * segments + segment) * K * V
    d_state_out_ptr += run * K * V
    after = tl.exp2(tl.load(after_ptr + run * segments + segment))
    row = tl.cast(batch, tl.int64) * T
    q_ptr += (row * H + head // (H_v // H)) * K
    k_ptr += (row * H + head // (H_v // H)) * K
    token_head = row * H_v + head
    if DECAY_GRADIENT:
        inside, mask = state_tile(d_states_ptr, 0, k_first, V, K, 1, V, BV, BK)
        outside, _ = state_tile(d_state_out_ptr, 0, k_first, V, K, 1, V, BV, BK)
        state = tl.load(inside, mask=mask, other=0.0) + after * tl.load(outside, mask=mask, other=0.0)
        end_ptr = states_ptr + (run * segments + segment + 1) * K * V
        if segment == segments - 1:
            end_ptr = state_out_ptr + run * K * V
        end, _ = state_tile(end_ptr, 0, k_first, V, K, 1, V, BV, BK)
        # Rounded as the sweep rounds it, so that what the last tokens add to S_end cancels.
        rounded = state.to(v_ptr.dtype.element_ty) if v_ptr.dtype.element_ty == tl.bfloat16 else state
        carry = tl.sum(tl.load(end, mask=mask, other=0.0) * rounded.to(tl.float32))
        scalars = (tl.cast(part, tl.int64) * B * H_v + run) * T
        scalar_sweep(
            v_ptr + token_head * V, do_ptr + token_head * V, q_ptr, dk_ptr + token_head * K, k_ptr,
            g_ptr, prefix_ptr + run * T, suffix_ptr + run * T, terms_ptr + scalars, dg_ptr + scalars, carry,
            state, H_v * V, H_v * V, H * K, H_v * K, scale, T, H_v, batch, head, first, last, k_first,
            V, K, BV, BK, C, KIND, True, EXACT, DESCRIPTORS, PRECISION,
        )  # fmt: skip
    else:
        inside, mask = state_tile(d_states_ptr, k_first, 0, K, V, V, 1, BK, BV)
        outside, _ = state_tile(d_state_out_ptr, k_first, 0, K, V, V, 1, BK, BV)
        sweep(
            v_ptr + token_head * V, do_ptr + token_head * V, q_ptr, dk_ptr + token_head * K,
            g_ptr, prefix_ptr + run * T, suffix_ptr + run * T,
            tl.load(inside, mask=mask, other=0.0) + after * tl.load(outside, mask=mask, other=0.0),
            H_v * V, H_v * V, H * K, H_v * K, scale, T, H_v, batch, head, first, last, k_first,
            V, K, BV, BK, C, KIND, True, EXACT, DESCRIPTORS, PRECISION,
        )  # fmt: skip
