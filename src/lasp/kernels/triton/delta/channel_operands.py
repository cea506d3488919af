# mypy: ignore-errors
"""Prepares, chunk by chunk, what sweeps of a gate per channel read: operands with their decays, scores, overlaps.

    P_ij = scale sum_K q_i k_j 2^between(i, j), j <= i        L_ij = sum_K r_i k_j 2^between(i, j), j < i

Where a chunk's gates are bounded all its tokens meet in its middle (as in
`decay.channel.bounded_prepare`): one product each.
Others are marked, and left to `channel_scores`.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import chunk_place, load_chunk, store_chunk, view
from lasp.kernels.triton.decay.channel.decays import (
    MAX_TO_MIDDLE_LOG2,
    MIN_MEAN_LOG2,
    gate_operand,
    load_channel_gates,
    prefix_sums,
    suffix_sums,
    sums_to_middle,
)
from lasp.kernels.triton.delta.chunk import BLOCK, lengths


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "chunks", "group"])
def delta_channel_operands_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    r_ptr,  # likewise, if ERASES: what tokens read with
    g_ptr,  # fp32 [B, T, H_v, K]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    intervals_ptr,  # [LEVELS + 2, C, C], see `load_intervals`
    queries_ptr,  # [B, T, H_v, K], written if QUERIES: scale q 2^prefix
    reading_ptr,  # likewise, written if KEYS: k 2^prefix, of r if ERASES
    storing_ptr,  # likewise: k 2^suffix
    totals_ptr,  # fp32 [B, H_v, chunks, K], written if KEYS: base-2 log-decay of the chunk
    scores_ptr,  # [B, H_v, chunks, C, C], written if QUERIES and BOUNDED: P
    overlaps_ptr,  # fp32 likewise, written if KEYS and BOUNDED: L, but for blocks above the diagonal
    unbounded_ptr,  # int32 [B, H_v, chunks], written if KEYS and BOUNDED: whether the chunk is left to `channel_scores`
    places_ptr,  # int32 [chunks, 4] if PACKED
    scale,
    T,
    H,
    H_v,
    chunks,
    group,  # chunks a program
    K: tl.constexpr,
    BK: tl.constexpr,  # channels at a time
    C: tl.constexpr,
    ERASES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    QUERIES: tl.constexpr,  # whether what queries need is wanted
    KEYS: tl.constexpr,  # and what keys need
    BOUNDED: tl.constexpr,  # whether the dtype has the range for decays from the middle
    DESCRIPTORS: tl.constexpr,
    STORES: tl.constexpr,  # whether descriptors write too
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    head = tl.program_id(1) % H_v
    batch = tl.cast(tl.program_id(1) // H_v, tl.int64)
    key_head = head // (H_v // H)
    key_row = (batch * T * H + key_head) * K
    row = (batch * T * H_v + head) * K
    # Chunks that end before their documents do are read and written by pointers: the copy engine knows no such end.
    q_view = view(q_ptr + key_row, T, H * K, K, C, BK, DESCRIPTORS)
    k_view = view(k_ptr + key_row, T, H * K, K, C, BK, DESCRIPTORS)
    r_view = view(r_ptr + key_row, T, H * K, K, C, BK, DESCRIPTORS)
    g_view = view(g_ptr + row, T, H_v * K, K, C, BK, DESCRIPTORS)
    if QUERIES:
        queries_view = view(queries_ptr + row, T, H_v * K, K, C, BK, STORES)
    if KEYS:
        reading_view = view(reading_ptr + row, T, H_v * K, K, C, BK, STORES)
        storing_view = view(storing_ptr + row, T, H_v * K, K, C, BK, STORES)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    begin = tl.program_id(0) * group
    for chunk in tl.range(begin, tl.minimum(begin + group, chunks), flatten=True):
        first, last = chunk_place(places_ptr, chunk, T, C, PACKED)
        at = (batch * H_v + head) * chunks + chunk
        norms_at = ((batch * H + key_head) * chunks + chunk) * C
        k_norms = lengths(k_norms_ptr, norms_at, C, NORMALIZE)[:, None]
        if QUERIES:
            q_norms = lengths(q_norms_ptr, norms_at, C, NORMALIZE)[:, None] * scale
        scores = tl.zeros((C, C), tl.float32)
        overlaps = tl.zeros((C, C), tl.float32)
        longest = 0.0
        for column in range(0, K, BK):
            k = load_chunk(k_view, first, column, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32) * k_norms
            gates = load_channel_gates(g_view, first, last, column, last, H_v * K, K, C, BK, DESCRIPTORS)
            operand = gate_operand(gates, dtype)
            from_start = tl.exp2(prefix_sums(operand, C))
            if KEYS:
                d = column + tl.arange(0, BK)
                tl.store(totals_ptr + at * K + d, tl.sum(gates, 0), mask=d < K)
                r = k
                if ERASES:
                    r = load_chunk(r_view, first, column, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32)
                reads = (r * from_start).to(dtype)
                store_chunk(reading_view, reads, first, column, last, H_v * K, K, C, BK, STORES)
                stored = (k * tl.exp2(suffix_sums(operand, C))).to(dtype)
                store_chunk(storing_view, stored, first, column, last, H_v * K, K, C, BK, STORES)
            if QUERIES:
                q = load_chunk(q_view, first, column, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32) * q_norms
                queries = (q * from_start).to(dtype)
                store_chunk(queries_view, queries, first, column, last, H_v * K, K, C, BK, STORES)
            if BOUNDED:
                to_middle = sums_to_middle(intervals_ptr, operand, C)
                longest = tl.maximum(longest, tl.max(tl.abs(to_middle)))
                near_t = tl.trans((k * tl.exp2(-to_middle)).to(dtype))
                to_middle = tl.exp2(to_middle)
                if KEYS:
                    overlaps = tl.dot((r * to_middle).to(dtype), near_t, overlaps, input_precision=PRECISION)
                if QUERIES:
                    scores = tl.dot((q * to_middle).to(dtype), near_t, scores, input_precision=PRECISION)
        if BOUNDED and KEYS:
            bound = tl.minimum((last - first - 1) * -MIN_MEAN_LOG2, MAX_TO_MIDDLE_LOG2)
            tl.store(unbounded_ptr + at, (longest >= bound).to(tl.int32))
        if BOUNDED:
            # Of later keys they may be anything, infinite and NaN too.
            tile = at * C * C + i * C + j
            if KEYS:
                tl.store(overlaps_ptr + tile, tl.where(i > j, overlaps, 0.0), mask=i // BLOCK >= j // BLOCK)
            if QUERIES:
                tl.store(scores_ptr + tile, tl.where(i >= j, scores, 0.0).to(dtype))
