"""Outputs, and the states that enter each segment with other ranks' part applied."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import head_gates
from lasp.kernels.triton.common.program import place
from lasp.kernels.triton.common.tiles import state_tile
from lasp.kernels.triton.decay.scalar.sweep import GATHERED, gather, segment_state, sweep


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def output_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v], [B, T, H_v] or unused
    prefix_ptr,  # fp32 [B, H_v, chunks C] or unused
    suffix_ptr,  # likewise
    o_ptr,  # [B, T, H_v, V], written
    states_ptr,  # fp32 [B, H_v, segments, K, V] from zero; replaced by those from state_in; see GATHER, KEEPS
    before_ptr,  # fp32 [B, H_v, segments]: decay from the run's start to each segment; unused if GATHER
    state_out_ptr,  # fp32 [B, H_v, K, V], written
    places_ptr,  # int32 [segments, 7] if PACKED
    state_in_ptr,  # fp32 [B, H_v, K, V], or None for zero; always None if GATHER
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
    BV: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    LEARNED: tl.constexpr,  # whether the decay's gradient is wanted, for which k is weighted: see `add_chunk`
    GATHER: tl.constexpr,  # 0 if states are read, else as in `sweep`
    KEEPS: tl.constexpr,  # whether they are written if GATHERED
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (V + BV - 1) // BV
    part, head, batch, segment, first, last, chunk, border, ends = place(
        places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED
    )
    v_first = part * BV
    run = tl.cast(batch, tl.int64) * H_v + head
    entering, mask = state_tile(states_ptr + (run * segments + segment) * K * V, v_first, 0, V, K, 1, V, BV, BK)
    state = segment_state(entering, mask, GATHER)
    if state_in_ptr is not None:
        outside, _ = state_tile(state_in_ptr + border * K * V, v_first, 0, V, K, 1, V, BV, BK)
        before = tl.exp2(tl.load(before_ptr + run * segments + segment))
        state += before * tl.load(outside, mask=mask, other=0.0)
        # A tile smaller than the program is held by several threads: none may store before all have loaded.
        tl.debug_barrier()
        tl.store(entering, state, mask=mask)

    padded = run * chunks * C
    row = tl.cast(batch, tl.int64) * T
    qk = (row * H + head // (H_v // H)) * K
    vo = (row * H_v + head) * V
    slot = chunk * C - first
    g_ptr = head_gates(g_ptr, batch, head, T, H_v, KIND)
    if GATHER == GATHERED:
        state = gather(
            v_ptr + vo, k_ptr + qk, g_ptr, prefix_ptr + padded, suffix_ptr + padded, places_ptr,
            state, H_v * V, H * K, scale, T, first, last, slot, v_first,
            V, K, BV, BK, C, KIND, False, LEARNED, EXACT, DESCRIPTORS, PACKED, PRECISION,
        )  # fmt: skip
        if KEEPS:
            tl.store(entering, state, mask=mask)
    state = sweep(
        q_ptr + qk, k_ptr + qk, v_ptr + vo, o_ptr + vo,
        g_ptr, prefix_ptr + padded, suffix_ptr + padded, o_ptr + vo, o_ptr + vo, o_ptr,
        state, H * K, H * K, H_v * V, H_v * V, 0, scale, H_v, first, last, slot, v_first,
        K, V, BK, BV, C, KIND, False, False, LEARNED, EXACT, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    if ends:
        leaving, _ = state_tile(state_out_ptr + border * K * V, v_first, 0, V, K, 1, V, BV, BK)
        tl.store(leaving, state, mask=mask)
