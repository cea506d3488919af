"""The gradients of k and v in one launch, where they are the same sweep of other operands: K = V, ungrouped heads, no
gradient of the decay.

Programs are paired: one makes dk and one dv of the same tokens. They keep pace, so that what both read, q and do, comes
from memory once and from L2 the second time.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import head_gates
from lasp.kernels.triton.common.program import place
from lasp.kernels.triton.common.tiles import state_tile
from lasp.kernels.triton.decay.scalar.sweep import GATHERED, decay_to_segment, gather, segment_state, sweep


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def key_value_gradient_kernel(
    q_ptr,  # [B, T, H, D]
    k_ptr,  # [B, T, H, D]
    v_ptr,  # [B, T, H, D]
    do_ptr,  # [B, T, H, D]
    g_ptr,  # [H], [B, T, H] or unused
    prefix_ptr,  # fp32 [B, H, chunks C] or unused
    suffix_ptr,  # likewise
    dk_ptr,  # [B, T, H, D], written
    dv_ptr,  # [B, T, H, D], written
    d_states_ptr,  # fp32 [B, H, segments, D, D]: gradients of those leaving each segment, from zero; unused if GATHER
    after_ptr,  # fp32 [B, H, segments]: decay from each segment to the run's end; unused if GATHER
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # fp32 [B, H, D, D], or None for zero
    scale,
    T,
    H,
    H_v,  # H
    segments,
    segment_chunks,
    chunks,
    K: tl.constexpr,  # D
    V: tl.constexpr,  # D
    BA: tl.constexpr,  # that holds D
    BC: tl.constexpr,  # columns of a gradient that a program has
    C: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    GATHER: tl.constexpr,  # 0 if d_states are read, else as in `sweep`
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (K + BC - 1) // BC
    part, head, batch, segment, first, last, chunk, border, _ = place(
        places_ptr, 2 * slices, segments, segment_chunks, T, H, C, PACKED
    )
    of_keys = part % 2 == 0
    column = part // 2 * BC
    run = tl.cast(batch, tl.int64) * H + head
    # The sweep holds the state with its outputs' dim first.
    row = tl.where(of_keys, V, 1)
    along = tl.where(of_keys, 1, V)
    inside, mask = state_tile(d_states_ptr + (run * segments + segment) * K * V, column, 0, K, V, row, along, BC, BA)
    state = segment_state(inside, mask, GATHER)
    if d_state_out_ptr is not None:
        outside, _ = state_tile(d_state_out_ptr + border * K * V, column, 0, K, V, row, along, BC, BA)
        after = decay_to_segment(after_ptr + run * segments + segment, GATHER)
        state += after * tl.load(outside, mask=mask, other=0.0)

    padded = run * chunks * C
    at = (tl.cast(batch, tl.int64) * T * H + head) * K
    out_ptr = tl.where(of_keys, dk_ptr, dv_ptr) + at
    b_ptr = tl.where(of_keys, do_ptr, q_ptr) + at
    c_ptr = tl.where(of_keys, q_ptr, do_ptr) + at
    slot = chunk * C - first
    g_ptr = head_gates(g_ptr, batch, head, T, H, KIND)
    if GATHER == GATHERED:
        state = gather(
            c_ptr, b_ptr, g_ptr, prefix_ptr + padded, suffix_ptr + padded, places_ptr,
            state, H * K, H * K, scale, T, first, last, slot, column,
            K, V, BC, BA, C, KIND, True, False, EXACT, DESCRIPTORS, PACKED, PRECISION,
        )  # fmt: skip
    sweep(
        tl.where(of_keys, v_ptr, k_ptr) + at, b_ptr, c_ptr, out_ptr,
        g_ptr, prefix_ptr + padded, suffix_ptr + padded, out_ptr, out_ptr, out_ptr,
        state, H * K, H * K, H * K, H * K, 0, scale, H, first, last, slot, column,
        K, V, BA, BC, C, KIND, True, False, False, EXACT, DESCRIPTORS, PRECISION,
    )  # fmt: skip
