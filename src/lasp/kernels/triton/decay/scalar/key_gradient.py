"""The gradient of k, in reverse order."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import head_gates
from lasp.kernels.triton.common.program import place, run_bounds
from lasp.kernels.triton.decay.scalar.intervals import inner_borders, key_tile
from lasp.kernels.triton.decay.scalar.sweep import GATHERED, PART_ROWS, decay_to_segment, gather, segment_state, sweep
from lasp.kernels.triton.decay.scalar.sweep_row_major import sweep_rows


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def key_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v], [B, T, H_v] or unused
    prefix_ptr,  # fp32 [B, H_v, chunks C] or unused
    suffix_ptr,  # likewise
    dk_ptr,  # [B, T, H_v, K], written
    sums_ptr,  # fp32 [parts, 2, B, H_v, chunks C], written if SUMS: k . dk, of the state and of chunks
    inner_ptr,  # fp32 [B, H_v, legs, K, V], written if SUMS: see `inner_borders`
    d_state_in_ptr,  # fp32 [B, H_v, K, V], written if SUMS and not FROM_ZERO: gradients of those entering the run
    d_states_ptr,  # fp32 [B, H_v, segments, K, V]: of those leaving each segment, from zero, not read if GATHER;
    # replaced, if SUMS, by those with d_state_out; see KEEPS
    after_ptr,  # fp32 [B, H_v, segments]: decay from each segment to the run's end; unused if GATHER
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # fp32 [B, H_v, K, V], or None for zero
    scale,
    B,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # columns of dk a program has
    BV: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,  # whether by `sweep_rows`
    EXACT: tl.constexpr,
    GATHER: tl.constexpr,  # 0 if d_states are read, else as in `sweep`; with ROWS never GATHERED
    KEEPS: tl.constexpr,  # whether they are written if GATHERED and SUMS
    FROM_ZERO: tl.constexpr,  # whether no run has an initial state
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (K + BK - 1) // BK
    part, head, batch, segment, first, last, chunk, border, _ = place(
        places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED
    )
    k_first = part * BK
    run = tl.cast(batch, tl.int64) * H_v + head
    index = run * segments + segment
    inside, mask = key_tile(d_states_ptr + index * K * V, k_first, K, V, BK, BV, ROWS)
    state = segment_state(inside, mask, GATHER)
    if d_state_out_ptr is not None:
        outside, _ = key_tile(d_state_out_ptr + border * K * V, k_first, K, V, BK, BV, ROWS)
        after = decay_to_segment(after_ptr + index, GATHER)
        state += after * tl.load(outside, mask=mask, other=0.0)
    slot = chunk * C - first
    g_ptr = head_gates(g_ptr, batch, head, T, H_v, KIND)
    padded = chunks * C
    sums_row = tl.cast(B, tl.int64) * H_v * padded
    row = tl.cast(batch, tl.int64) * T
    qk = (row * H + head // (H_v // H)) * K
    token_head = row * H_v + head
    prefix_ptr += run * padded
    suffix_ptr += run * padded
    inner_ptr = inner_borders(inner_ptr, run, chunks, chunk, K * V, EXACT)
    tl.static_assert(not ROWS or GATHER != GATHERED)
    if GATHER == GATHERED:
        state = gather(
            q_ptr + qk, do_ptr + token_head * V, g_ptr, prefix_ptr, suffix_ptr, places_ptr,
            state, H * K, H_v * V, scale, T, first, last, slot, k_first,
            K, V, BK, BV, C, KIND, True, False, EXACT, DESCRIPTORS, PACKED, PRECISION,
        )  # fmt: skip
    if SUMS and (KEEPS if GATHER else d_state_out_ptr is not None):
        # A tile smaller than the program is held by several threads: none may store before all have loaded.
        tl.debug_barrier()
        tl.store(inside, state, mask=mask)
    if ROWS:
        state = sweep_rows(
            v_ptr + token_head * V, do_ptr + token_head * V, q_ptr + qk, dk_ptr + token_head * K,
            g_ptr, prefix_ptr, k_ptr + qk, sums_ptr + part * 2 * sums_row + run * padded, inner_ptr,
            state, H_v * V, H * K, H_v * K, sums_row, scale, H_v, first, last, slot, k_first,
            V, K, BV, BK, C, KIND, True, DESCRIPTORS, PRECISION,
        )  # fmt: skip
    else:
        state = sweep(
            v_ptr + token_head * V, do_ptr + token_head * V, q_ptr + qk, dk_ptr + token_head * K,
            g_ptr, prefix_ptr, suffix_ptr,
            k_ptr + qk, sums_ptr + part * (BK // PART_ROWS) * 2 * sums_row + run * padded, inner_ptr,
            state, H_v * V, H_v * V, H * K, H_v * K, sums_row, scale, H_v, first, last, slot, k_first,
            V, K, BV, BK, C, KIND, True, SUMS, False, EXACT, DESCRIPTORS, PRECISION,
        )  # fmt: skip
    if SUMS and not FROM_ZERO:
        begin, _ = run_bounds(places_ptr, T, PACKED)
        if first == begin:
            entering, within = key_tile(d_state_in_ptr + border * K * V, k_first, K, V, BK, BV, ROWS)
            tl.store(entering, state, mask=within)
