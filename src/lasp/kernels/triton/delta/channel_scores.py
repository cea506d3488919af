# mypy: ignore-errors
"""Scores and overlaps of a gate per channel for any gates: of the chunks that `channel_operands` has left.

By levels, as in `decay.channel.prepare`: two tokens meet in the middle of one block of 2^(level + 1) tokens.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import DESCRIPTORS, chunk_place, load_chunk
from lasp.kernels.triton.decay.channel.decays import (
    base_operand,
    gate_operand,
    in_base_block,
    is_done,
    is_late,
    load_channel_gates,
    load_intervals,
    meets,
    sum_over,
)
from lasp.kernels.triton.delta.chunk import BLOCK, lengths


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "chunks"])
def delta_channel_scores_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    r_ptr,  # likewise, if ERASES: what tokens read with
    g_ptr,  # fp32 [B, T, H_v, K]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    intervals_ptr,  # [LEVELS + 2, C, C], see `load_intervals`
    scores_ptr,  # [B, H_v, chunks, C, C], written if QUERIES: P
    overlaps_ptr,  # fp32 likewise, written if KEYS: L, but for blocks above the diagonal
    unbounded_ptr,  # int32 [B, H_v, chunks] if UNBOUNDED
    places_ptr,  # int32 [chunks, 4] if PACKED
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
    KEYS: tl.constexpr,  # and what keys need, of programs of their own
    BASE: tl.constexpr,  # 2^BASE tokens a base block
    LEVELS: tl.constexpr,  # log2(C)
    UNBOUNDED: tl.constexpr,  # only the chunks that are marked
    GROUP: tl.constexpr,  # chunks a program
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    groups = tl.cdiv(chunks, GROUP)
    of_queries = tl.program_id(0) >= groups if QUERIES and KEYS else QUERIES
    begin = tl.program_id(0) % groups * GROUP
    head = tl.program_id(1) % H_v
    batch = tl.cast(tl.program_id(1) // H_v, tl.int64)
    run = (batch * H_v + head) * chunks
    if UNBOUNDED:
        # Next to none is marked where gates are mild: a program looks at its chunks' marks at once.
        n = begin + tl.arange(0, GROUP)
        if tl.max(tl.load(unbounded_ptr + run + n, mask=n < chunks, other=0), 0) == 0:
            return
    key_head = head // (H_v // H)
    qk = (batch * T * H + key_head) * K
    out = (batch * T * H_v + head) * K
    rows_ptr = r_ptr if ERASES else k_ptr
    if of_queries:
        rows_ptr = q_ptr
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    for chunk in range(begin, tl.minimum(begin + GROUP, chunks)):
        at = run + chunk
        if not is_done(unbounded_ptr, at, UNBOUNDED):
            first, last = chunk_place(places_ptr, chunk, T, C, PACKED)
            norms_at = ((batch * H + key_head) * chunks + chunk) * C
            k_norms = lengths(k_norms_ptr, norms_at, C, NORMALIZE)[:, None]
            norms = k_norms
            if of_queries:
                norms = lengths(q_norms_ptr, norms_at, C, NORMALIZE)[:, None] * scale
            scores = tl.zeros((C, C), tl.float32)
            for column in range(0, K, BK):
                rows = (
                    load_chunk(rows_ptr + qk, first, column, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32) * norms
                )
                k = load_chunk(k_ptr + qk, first, column, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32) * k_norms
                gates = load_channel_gates(g_ptr + out, first, last, column, last, H_v * K, K, C, BK, DESCRIPTORS)
                if BASE > 0:
                    to_middle = sum_over(load_intervals(intervals_ptr, -1, C), base_operand(gates, dtype))
                    base_rows = (rows * tl.exp2(to_middle)).to(dtype)
                    base_k = (k * tl.exp2(-to_middle)).to(dtype)
                else:
                    base_rows = rows.to(dtype)
                    base_k = k.to(dtype)
                base = tl.dot(base_rows, tl.trans(base_k), input_precision=PRECISION)
                scores += tl.where(in_base_block(BASE, C), base, 0.0)
                operand = gate_operand(gates, dtype)
                for level in range(BASE, LEVELS):
                    decay = tl.exp2(sum_over(load_intervals(intervals_ptr, level, C), operand))
                    x = (tl.where(is_late(level, C), rows, k) * decay).to(dtype)
                    scores += tl.where(meets(level, C), tl.dot(x, tl.trans(x), input_precision=PRECISION), 0.0)
            tile = at * C * C + i * C + j
            if of_queries:
                tl.store(scores_ptr + tile, tl.where(i >= j, scores, 0.0).to(dtype))
            else:
                tl.store(overlaps_ptr + tile, tl.where(i > j, scores, 0.0), mask=i // BLOCK >= j // BLOCK)
