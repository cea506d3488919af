# mypy: ignore-errors
"""Prepares, chunk by chunk, what every sweep of a gate per channel reads: scores, and operands with their decays.

    scores_ij = sum_K q_i k_j 2^between(i, j), j <= i

is no plain product of q and k, and splitting 2^between(i, j) over a common reference would overflow. But two tokens
always meet at one power of two: there is one `level` such that j is in the early half and i in the late half of a
block of 2^(level + 1) tokens, and its middle lies between them, so that both decays to the middle are <= 1:

    2^between(i, j) = 2^(from the middle to i) 2^(from j to the middle).

So the scores are a product for every level, masked to the pairs that meet there. At one level a token is late or
early, never both: with x = q in late rows and k in early ones, decayed to or from the middle, that product is x x^T,
one operand made once. The lowest levels are taken together, in base blocks of 2^BASE tokens that all meet in their
block's middle: of two tokens on one side of it one is then divided by a decay, which bf16 has the range for up to 16
tokens (others take single tokens: the diagonal). Chunks are independent: nothing here needs a state or another rank, so
it runs while the exchange is under way.

This takes any gates. In bf16 it is left the chunks that `channel_bounded_prepare` cannot do.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import DESCRIPTORS, chunk_place, chunk_rows, load_chunk, store_chunk
from lasp.kernels.triton.decay.channel.decays import (
    base_operand,
    gate_operand,
    in_base_block,
    is_done,
    is_late,
    load_channel_gates,
    load_intervals,
    meets,
    prefix_sums,
    suffix_sums,
    sum_over,
)


@triton.jit(do_not_specialize=["scale", "T", "H", "H_g", "chunks"])
def channel_prepare_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    g_ptr,  # [B, T, H_g, K]
    intervals_ptr,  # [LEVELS + 2, C, C], see `load_intervals`
    scores_ptr,  # [B, H_g, T, C], written
    from_start_ptr,  # [B, T, H_g, K], written: scale q_i 2^prefix_i
    to_end_ptr,  # [B, T, H_g, K], written: k_j 2^suffix_j
    totals_ptr,  # fp32 [B, H_g, chunks, K], written: base-2 log-decay of the chunk
    unbounded_ptr,  # int32 [B, H_g, chunks] if UNBOUNDED
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
    BASE: tl.constexpr,  # 2^BASE tokens a base block
    LEVELS: tl.constexpr,  # log2(C)
    UNBOUNDED: tl.constexpr,  # only the chunks that channel_bounded_prepare has marked
):
    _, run, chunk, qk_row, row = chunk_rows(1, chunks, T, H, H_g)
    if is_done(unbounded_ptr, chunk, UNBOUNDED):
        return
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    first, last = chunk_place(places_ptr, tl.program_id(1), T, C, PACKED)
    rows = (qk_row + tl.cast(first, tl.int64) * H) * K
    q_at = q_ptr + qk_row * K
    k_at = k_ptr + qk_row * K
    g_at = g_ptr + row * K
    from_start_at = from_start_ptr + row * K
    to_end_at = to_end_ptr + row * K
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    scores = tl.zeros((C, C), tl.float32)
    for k_first in range(0, K, BK):
        q = load_chunk(q_at, first, k_first, last, H * K, K, C, BK, DESCRIPTORS)
        k = load_chunk(k_at, first, k_first, last, H * K, K, C, BK, DESCRIPTORS)
        gates = load_channel_gates(g_at, first, last, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
        if BASE > 0:
            to_middle = sum_over(load_intervals(intervals_ptr, -1, C), base_operand(gates, dtype))
            base_q = (q * tl.exp2(to_middle)).to(dtype)
            base_k = (k * tl.exp2(-to_middle)).to(dtype)
        else:
            base_q = q
            base_k = k
        base = tl.dot(base_q, tl.trans(base_k), input_precision=PRECISION)
        scores += tl.where(in_base_block(BASE, C), base, 0.0)
        operand = gate_operand(gates, dtype)
        # q's rows and k's lie apart by the same strides, so one load reads late rows from q and early ones from k.
        columns = k_first + tl.arange(0, BK)
        offsets = tl.arange(0, C)[:, None] * (H * K) + columns[None, :]
        inside = (first + tl.arange(0, C) < last)[:, None] & (columns < K)[None, :]
        for level in range(BASE, LEVELS):
            x = tl.load(tl.where(is_late(level, C), q_ptr + rows, k_ptr + rows) + offsets, mask=inside, other=0.0)
            decay = tl.exp2(sum_over(load_intervals(intervals_ptr, level, C), operand))
            x = (x * decay).to(dtype)
            scores += tl.where(meets(level, C), tl.dot(x, tl.trans(x), input_precision=PRECISION), 0.0)
        from_start = (q * (tl.exp2(prefix_sums(operand, C)) * scale)).to(dtype)
        store_chunk(from_start_at, from_start, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
        to_end = (k * tl.exp2(suffix_sums(operand, C))).to(dtype)
        store_chunk(to_end_at, to_end, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
        channel = k_first + tl.arange(0, BK)
        tl.store(totals_ptr + chunk * K + channel, tl.sum(gates, 0), mask=channel < K)
    out = scores_ptr + run * T * C
    store_chunk(out, tl.where(i >= j, scores, 0.0).to(dtype), first, 0, last, C, C, C, C, DESCRIPTORS)
