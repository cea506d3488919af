# mypy: ignore-errors
"""Prepares, chunk by chunk, what sweeps of a gate per channel read: operands with their decays, scores, overlaps.

    P_ij = scale sum_K q_i k_j 2^between(i, j), j <= i        L_ij = sum_K r_i k_j 2^between(i, j), j < i

Where a chunk's gates are bounded all its tokens meet in its middle (as in
`decay.channel.bounded_prepare`): one product each.
Others are marked, and left to `channel_scores`.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import DESCRIPTORS, chunk_place, load_chunk, store_chunk
from lasp.kernels.triton.decay.channel.decays import (
    MAX_TO_MIDDLE_LOG2,
    MIN_MEAN_LOG2,
    gate_operand,
    load_channel_gates,
    prefix_sums,
    suffix_sums,
    sums_to_middle,
)
from lasp.kernels.triton.delta.chunk import lengths


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "chunks"])
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
    overlaps_ptr,  # fp32 likewise, written if KEYS and BOUNDED: L
    unbounded_ptr,  # int32 [B, H_v, chunks], written if BOUNDED: whether the chunk is left to `channel_scores`
    places_ptr,  # int32 [chunks, 3] if PACKED
    scale,
    T,
    H,
    H_v,
    chunks,
    K: tl.constexpr,
    BK: tl.constexpr,  # channels at a time
    C: tl.constexpr,
    ERASES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    QUERIES: tl.constexpr,  # whether what queries need is wanted
    KEYS: tl.constexpr,  # and what keys need
    BOUNDED: tl.constexpr,  # whether the dtype has the range for decays from the middle
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    chunk = tl.program_id(0)
    first, last = chunk_place(places_ptr, chunk, T, C, PACKED)
    head = tl.program_id(1) % H_v
    batch = tl.cast(tl.program_id(1) // H_v, tl.int64)
    key_head = head // (H_v // H)
    at = (batch * H_v + head) * chunks + chunk
    qk = (batch * T * H + key_head) * K
    out = (batch * T * H_v + head) * K
    norms_at = ((batch * H + key_head) * chunks + chunk) * C
    k_norms = lengths(k_norms_ptr, norms_at, C, NORMALIZE)[:, None]
    if QUERIES:
        q_norms = lengths(q_norms_ptr, norms_at, C, NORMALIZE)[:, None] * scale
    scores = tl.zeros((C, C), tl.float32)
    overlaps = tl.zeros((C, C), tl.float32)
    longest = 0.0
    for column in range(0, K, BK):
        k = load_chunk(k_ptr + qk, first, column, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32) * k_norms
        gates = load_channel_gates(g_ptr + out, first, last, column, last, H_v * K, K, C, BK, DESCRIPTORS)
        operand = gate_operand(gates, dtype)
        from_start = tl.exp2(prefix_sums(operand, C))
        if KEYS:
            d = column + tl.arange(0, BK)
            tl.store(totals_ptr + at * K + d, tl.sum(gates, 0), mask=d < K)
            r = k
            if ERASES:
                r = load_chunk(r_ptr + qk, first, column, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32)
            reads = (r * from_start).to(dtype)
            store_chunk(reading_ptr + out, reads, first, column, last, H_v * K, K, C, BK, DESCRIPTORS)
            stored = (k * tl.exp2(suffix_sums(operand, C))).to(dtype)
            store_chunk(storing_ptr + out, stored, first, column, last, H_v * K, K, C, BK, DESCRIPTORS)
        if QUERIES:
            q = load_chunk(q_ptr + qk, first, column, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32) * q_norms
            queries = (q * from_start).to(dtype)
            store_chunk(queries_ptr + out, queries, first, column, last, H_v * K, K, C, BK, DESCRIPTORS)
        if BOUNDED:
            to_middle = sums_to_middle(intervals_ptr, operand, C)
            longest = tl.maximum(longest, tl.max(tl.abs(to_middle)))
            near_t = tl.trans((k * tl.exp2(-to_middle)).to(dtype))
            to_middle = tl.exp2(to_middle)
            if KEYS:
                overlaps = tl.dot((r * to_middle).to(dtype), near_t, overlaps, input_precision=PRECISION)
            if QUERIES:
                scores = tl.dot((q * to_middle).to(dtype), near_t, scores, input_precision=PRECISION)
    if BOUNDED:
        if KEYS:
            bound = tl.minimum((last - first - 1) * -MIN_MEAN_LOG2, MAX_TO_MIDDLE_LOG2)
            tl.store(unbounded_ptr + at, (longest >= bound).to(tl.int32))
        # Of later keys they may be anything, infinite and NaN too.
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        tile = at * C * C + i * C + j
        if KEYS:
            tl.store(overlaps_ptr + tile, tl.where(i > j, overlaps, 0.0))
        if QUERIES:
            tl.store(scores_ptr + tile, tl.where(i >= j, scores, 0.0).to(dtype))
