"""The gradient of q, in forward order: it needs nothing of other ranks, so it hides the backward exchange."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import head_gates
from lasp.kernels.triton.common.program import place
from lasp.kernels.triton.decay.scalar.intervals import inner_borders, key_tile
from lasp.kernels.triton.decay.scalar.sweep import GATHERED, PART_ROWS, gather, segment_state, sweep
from lasp.kernels.triton.decay.scalar.sweep_row_major import sweep_rows


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def query_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v], [B, T, H_v] or unused
    prefix_ptr,  # fp32 [B, H_v, chunks C] or unused
    suffix_ptr,  # likewise
    dq_ptr,  # [B, T, H_v, K], written
    sums_ptr,  # fp32 [parts, 2, B, H_v, chunks C], written if SUMS: q . dq, of the state and of chunks
    inner_ptr,  # fp32 [B, H_v, legs, K, V], written if SUMS: see `inner_borders`
    states_ptr,  # fp32 [B, H_v, segments, K, V], those entering each segment; unused if GATHER
    places_ptr,  # int32 [segments, 7] if PACKED
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
    BK: tl.constexpr,  # columns of dq a program has
    BV: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,  # whether by `sweep_rows`
    EXACT: tl.constexpr,
    GATHER: tl.constexpr,  # 0 if states are read, else as in `sweep`; with ROWS never GATHERED
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (K + BK - 1) // BK
    part, head, batch, segment, first, last, chunk, _, _ = place(
        places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED
    )
    k_first = part * BK
    run = tl.cast(batch, tl.int64) * H_v + head
    padded = chunks * C
    sums_row = tl.cast(B, tl.int64) * H_v * padded
    row = tl.cast(batch, tl.int64) * T
    qk = (row * H + head // (H_v // H)) * K
    token_head = row * H_v + head
    prefix_ptr += run * padded
    suffix_ptr += run * padded
    inner_ptr = inner_borders(inner_ptr, run, chunks, chunk, K * V, EXACT)
    entering, mask = key_tile(states_ptr + (run * segments + segment) * K * V, k_first, K, V, BK, BV, ROWS)
    state = segment_state(entering, mask, GATHER)
    slot = chunk * C - first
    g_ptr = head_gates(g_ptr, batch, head, T, H_v, KIND)
    tl.static_assert(not ROWS or GATHER != GATHERED)
    if ROWS:
        sweep_rows(
            do_ptr + token_head * V, v_ptr + token_head * V, k_ptr + qk, dq_ptr + token_head * K,
            g_ptr, prefix_ptr, q_ptr + qk, sums_ptr + part * 2 * sums_row + run * padded, inner_ptr,
            state, H_v * V, H * K, H_v * K, sums_row, scale, H_v, first, last, slot, k_first,
            V, K, BV, BK, C, KIND, False, DESCRIPTORS, PRECISION,
        )  # fmt: skip
    else:
        if GATHER == GATHERED:
            state = gather(
                k_ptr + qk, v_ptr + token_head * V, g_ptr, prefix_ptr, suffix_ptr, places_ptr,
                state, H * K, H_v * V, scale, T, first, last, slot, k_first,
                K, V, BK, BV, C, KIND, False, False, EXACT, DESCRIPTORS, PACKED, PRECISION,
            )  # fmt: skip
        sweep(
            do_ptr + token_head * V, v_ptr + token_head * V, k_ptr + qk, dq_ptr + token_head * K,
            g_ptr, prefix_ptr, suffix_ptr,
            q_ptr + qk, sums_ptr + part * (BK // PART_ROWS) * 2 * sums_row + run * padded, inner_ptr,
            state, H_v * V, H_v * V, H * K, H_v * K, sums_row, scale, H_v, first, last, slot, k_first,
            V, K, BV, BK, C, KIND, False, SUMS, False, EXACT, DESCRIPTORS, PRECISION,
        )  # fmt: skip
