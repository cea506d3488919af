# mypy: ignore-errors
"""Does `channel_prepare`'s work for chunks whose gates are bounded: all their tokens meet in the chunk's middle.

    scores_ij = sum_K (q_i 2^to_i) (k_j 2^-to_j),     to: sums of gates from the middle, negative for tokens before it

One operand is divided by a decay, by 2^100 at most where gates are bounded, and bf16 has the range for that: so where
bf16 is the dtype, one product does what takes one per level otherwise. That needs half a chunk to be forgotten to
2^-100, so chunks that are not bounded are rare. Nor are those of a few tokens that may forget nearly all
(`MIN_MEAN_LOG2`): beside a token with itself nothing would be left of what crosses one. They are marked here and made
again by `channel_prepare`, whose registers would halve the speed of this kernel if they were one.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import DESCRIPTORS, chunk_place, chunk_rows, load_chunk, store_chunk
from lasp.kernels.triton.decay.channel.decays import (
    MAX_TO_MIDDLE_LOG2,
    MIN_MEAN_LOG2,
    gate_operand,
    load_channel_gates,
    prefix_sums,
    suffix_sums,
    sums_to_middle,
)


@triton.jit(do_not_specialize=["scale", "T", "H", "H_g", "chunks"])
def channel_bounded_prepare_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    g_ptr,  # [B, T, H_g, K]
    intervals_ptr,  # [LEVELS + 2, C, C], see `load_intervals`
    scores_ptr,  # [B, H_g, T, C], written
    from_start_ptr,  # [B, T, H_g, K], written: scale q_i 2^prefix_i
    to_end_ptr,  # [B, T, H_g, K], written: k_j 2^suffix_j
    totals_ptr,  # fp32 [B, H_g, chunks, K], written: base-2 log-decay of the chunk
    unbounded_ptr,  # int32 [B, H_g, chunks], written: whether the chunk is not bounded, and left to channel_prepare
    places_ptr,  # int32 [chunks, 4] if PACKED
    scale,
    T,
    H,
    H_g,
    chunks,
    K: tl.constexpr,
    BK: tl.constexpr,  # channels at a time
    C: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    first, last = chunk_place(places_ptr, tl.program_id(1), T, C, PACKED)
    _, run, chunk, qk_row, row = chunk_rows(1, chunks, T, H, H_g)
    q_at = q_ptr + qk_row * K
    k_at = k_ptr + qk_row * K
    g_at = g_ptr + row * K
    from_start_at = from_start_ptr + row * K
    to_end_at = to_end_ptr + row * K
    scores = tl.zeros((C, C), tl.float32)
    longest = 0.0
    for k_first in range(0, K, BK):
        q = load_chunk(q_at, first, k_first, last, H * K, K, C, BK, DESCRIPTORS)
        k = load_chunk(k_at, first, k_first, last, H * K, K, C, BK, DESCRIPTORS)
        gates = load_channel_gates(g_at, first, last, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
        channel = k_first + tl.arange(0, BK)
        tl.store(totals_ptr + chunk * K + channel, tl.sum(gates, 0), mask=channel < K)
        operand = gate_operand(gates, dtype)
        from_start = (q * (tl.exp2(prefix_sums(operand, C)) * scale)).to(dtype)
        store_chunk(from_start_at, from_start, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
        to_end = (k * tl.exp2(suffix_sums(operand, C))).to(dtype)
        store_chunk(to_end_at, to_end, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
        to_middle = sums_to_middle(intervals_ptr, operand, C)
        longest = tl.maximum(longest, tl.max(tl.abs(to_middle)))
        near_k = (k * tl.exp2(-to_middle)).to(dtype)
        near_q = (q * tl.exp2(to_middle)).to(dtype)
        scores = tl.dot(near_q, tl.trans(near_k), scores, input_precision=PRECISION)
    bound = tl.minimum((last - first - 1) * -MIN_MEAN_LOG2, MAX_TO_MIDDLE_LOG2)
    tl.store(unbounded_ptr + chunk, (longest >= bound).to(tl.int32))
    # Scores of later keys may be anything, infinite and NaN too.
    past = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    out = scores_ptr + run * T * C
    store_chunk(out, tl.where(past, scores, 0.0).to(dtype), first, 0, last, C, C, C, C, DESCRIPTORS)
