"""The gradient of v, in reverse order."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import head_gates
from lasp.kernels.triton.common.program import place
from lasp.kernels.triton.common.tiles import state_tile
from lasp.kernels.triton.decay.scalar.sweep import GATHERED, decay_to_segment, gather, segment_state, sweep


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def value_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v], [B, T, H_v] or unused
    prefix_ptr,  # fp32 [B, H_v, chunks C] or unused
    suffix_ptr,  # likewise
    dv_ptr,  # [B, T, H_v, V], written
    d_states_ptr,  # fp32 [B, H_v, segments, K, V]: gradients of those leaving each segment, from zero; unused if GATHER
    after_ptr,  # fp32 [B, H_v, segments]: decay from each segment to the run's end; unused if GATHER
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # fp32 [B, H_v, K, V], or None for zero
    scale,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,  # columns of dv a program has
    C: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    GATHER: tl.constexpr,  # 0 if d_states are read, else as in `sweep`
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
    inside, mask = state_tile(d_states_ptr + (run * segments + segment) * K * V, v_first, 0, V, K, 1, V, BV, BK)
    state = segment_state(inside, mask, GATHER)
    if d_state_out_ptr is not None:
        outside, _ = state_tile(d_state_out_ptr + border * K * V, v_first, 0, V, K, 1, V, BV, BK)
        after = decay_to_segment(after_ptr + run * segments + segment, GATHER)
        state += after * tl.load(outside, mask=mask, other=0.0)

    padded = run * chunks * C
    row = tl.cast(batch, tl.int64) * T
    qk = (row * H + head // (H_v // H)) * K
    vo = (row * H_v + head) * V
    slot = chunk * C - first
    g_ptr = head_gates(g_ptr, batch, head, T, H_v, KIND)
    if GATHER == GATHERED:
        state = gather(
            do_ptr + vo, q_ptr + qk, g_ptr, prefix_ptr + padded, suffix_ptr + padded, places_ptr,
            state, H_v * V, H * K, scale, T, first, last, slot, v_first,
            V, K, BV, BK, C, KIND, True, False, EXACT, DESCRIPTORS, PACKED, PRECISION,
        )  # fmt: skip
    sweep(
        k_ptr + qk, q_ptr + qk, do_ptr + vo, dv_ptr + vo,
        g_ptr, prefix_ptr + padded, suffix_ptr + padded, dv_ptr + vo, dv_ptr + vo, dv_ptr,
        state, H * K, H * K, H_v * V, H_v * V, 0, scale, H_v, first, last, slot, v_first,
        K, V, BK, BV, C, KIND, True, False, False, EXACT, DESCRIPTORS, PRECISION,
    )  # fmt: skip
