# mypy: ignore-errors
"""Does `channel_intra_chunk`'s work for chunks whose gates are bounded: all their tokens meet in the chunk's middle.

With near_q = q 2^to and near_k = k 2^-to as in channel_bounded_prepare, 2^prefix = 2^(to + early) and 2^suffix =
2^(late - to), early and late being the sums of gates of the chunk's halves:

    d_q_i = sum_{j <= i} d_scores_ij near_k_j + scale 2^early read_q_i        dq = 2^to d_q
    d_k_j = sum_{i >= j} d_scores_ij near_q_i +       2^late  read_k_j        dk = 2^-to d_k
    dg_t  = sum_{s >= t} (near_q_s d_q_s - near_k_s d_k_s) + leaving
    leaving = through + sum_s near_k_s 2^late read_k_s                        per channel, s within the chunk

What pairs within the chunk add to dg cancels where it should, to fp32, since both sides take the same rounded operands.
So does what tokens add to the state that leaves the chunk, which is summed here from what is subtracted again: where
gates are strong, dg is next to nothing a few tokens before a large `leaving`.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import DESCRIPTORS, begins_run, chunk_place, chunk_rows, load_chunk, store_chunk
from lasp.kernels.triton.decay.channel.decays import (
    gate_operand,
    load_channel_gates,
    load_sum,
    load_through,
    sums_to_end,
    sums_to_middle,
)


@triton.jit(do_not_specialize=["scale", "T", "H", "H_g", "chunks"])
def channel_bounded_intra_chunk_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V], H_v = GROUP H_g
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [B, T, H_g, K]; GROUP value heads share one
    intervals_ptr,  # [LEVELS + 2, C, C], see `load_intervals`
    unbounded_ptr,  # int32 [B, H_g, chunks]: the chunks left to channel_intra_chunk
    read_q_ptr,  # [B, T, H_v, K]: what do reads from the states
    read_k_ptr,  # [B, T, H_v, K]: what v reads from the gradients of states
    through_ptr,  # fp32 [B, H_v, chunks, K]: what passes from before each chunk to after it adds to dg
    dq_ptr,  # [B, T, H_g, K], written
    dk_ptr,  # likewise
    dg_ptr,  # fp32 likewise
    places_ptr,  # int32 [chunks, 4] if PACKED
    scale,
    T,
    H,
    H_g,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # channels a program has
    BV: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    FROM_ZERO: tl.constexpr,  # whether no run has an initial state
    GROUP: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    slices: tl.constexpr = (K + BK - 1) // BK
    part, run, chunk, qk_row, row = chunk_rows(slices, chunks, T, H, H_g)
    k_first = part * BK
    first, last = chunk_place(places_ptr, tl.program_id(1), T, C, PACKED)
    qk = qk_row * K
    out = row * K
    q_at = q_ptr + qk
    k_at = k_ptr + qk
    v_row = H_g * GROUP * V
    v_at = v_ptr + row * GROUP * V
    do_at = do_ptr + row * GROUP * V
    g_at = g_ptr + out
    read_q_at = read_q_ptr + out * GROUP
    read_k_at = read_k_ptr + out * GROUP
    dq_at = dq_ptr + out
    dk_at = dk_ptr + out
    dg_at = dg_ptr + out

    v = load_chunk(v_at, first, 0, last, v_row, V, C, BV, DESCRIPTORS)
    do = load_chunk(do_at, first, 0, last, v_row, V, C, BV, DESCRIPTORS)
    # After those loads, so that it waits with them.
    if tl.load(unbounded_ptr + chunk) != 0:
        return
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    # The transpose is a product of its own: see docs/design/kernels.md on transposed accumulators.
    d_scores = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    by_key = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    for other in tl.static_range(1, GROUP):
        v = load_chunk(v_at + other * V, first, 0, last, v_row, V, C, BV, DESCRIPTORS)
        do = load_chunk(do_at + other * V, first, 0, last, v_row, V, C, BV, DESCRIPTORS)
        d_scores = tl.dot(do, tl.trans(v), d_scores, input_precision=PRECISION)
        by_key = tl.dot(v, tl.trans(do), by_key, input_precision=PRECISION)
    d_scores = tl.where(i >= j, d_scores * scale, 0.0).to(dtype)
    by_key = tl.where(i <= j, by_key * scale, 0.0).to(dtype)
    gates = load_channel_gates(g_at, first, last, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    operand = gate_operand(gates, dtype)
    # Loads together, so that they wait together; the rest in an order that holds few tiles at a time.
    k = load_chunk(k_at, first, k_first, last, H * K, K, C, BK, DESCRIPTORS)
    read_q = load_sum(read_q_at, first, k_first, last, H_g, K, C, BK, GROUP)
    q = load_chunk(q_at, first, k_first, last, H * K, K, C, BK, DESCRIPTORS)
    read_k = load_sum(read_k_at, first, k_first, last, H_g, K, C, BK, GROUP)
    to_middle = sums_to_middle(intervals_ptr, operand, C)
    # Of gates as rounded, so that they and `to_middle` cancel.
    rounded = operand.to(tl.float32)
    early = tl.exp2(tl.sum(tl.where(i < C // 2, rounded, 0.0), 0)) * scale
    late = tl.exp2(tl.sum(tl.where(i < C // 2, 0.0, rounded), 0))
    to_q = tl.exp2(to_middle)
    to_k = tl.exp2(-to_middle)
    near_k = (k * to_k).to(dtype)
    d_q = tl.dot(d_scores, near_k, read_q * early[None, :], input_precision=PRECISION)
    dq = (to_q * d_q).to(dq_ptr.dtype.element_ty)
    store_chunk(dq_at, dq, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    near_q = (q * to_q).to(dtype)
    terms = near_q * d_q
    read_k = read_k * late[None, :]
    leaving = tl.sum(near_k * read_k, 0)
    d_k = tl.dot(by_key, near_q, read_k, input_precision=PRECISION)
    dk = (to_k * d_k).to(dk_ptr.dtype.element_ty)
    store_chunk(dk_at, dk, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    terms -= near_k * d_k
    channel = k_first + tl.arange(0, BK)
    leaving += load_through(through_ptr, run, chunks, channel, K, GROUP)
    dg = sums_to_end(terms, dtype, C) + leaving[None, :]
    if FROM_ZERO:
        # Nothing precedes a run's first token: exactly, not but for rounding.
        dg = tl.where((i == 0) & begins_run(places_ptr, tl.program_id(1), PACKED), 0.0, dg)
    store_chunk(dg_at, dg, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
