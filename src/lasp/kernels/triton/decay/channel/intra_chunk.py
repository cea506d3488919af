# mypy: ignore-errors
"""The gradients of q, k and the gate for a gate per channel, put together chunk by chunk.

    dq_i = sum_{j <= i} d_scores_ij 2^between(i, j) k_j + scale 2^prefix_i read_q_i  read_q = S do (channel_inter_chunk)
    dk_j = sum_{i >= j} d_scores_ij 2^between(i, j) q_i +       2^suffix_j read_k_j  read_k = D v
    dg_t = sum_{s >= t} (q_s dq_s - k_s dk_s) + sum_{s < t} reads_s + through    per channel, s within the chunk
    reads_s = k_s 2^suffix_s read_k_s

dk without what it reads: that is summed from the chunk's start, not taken off what leaves the chunk. There next to all
may be the last tokens', where gates forget and D is that of a final state, and what rounding leaves of it would be the
same at every token. The chunk's last token's crosses none.

Pairs within a chunk go by base blocks and levels as in channel_prepare: with x as there, and the d_scores of a level's
pairs made symmetric, late rows of their product give dq and early rows dk. Chunks are independent. As there, any gates,
and in bf16 what `channel_bounded_intra_chunk` cannot do.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import DESCRIPTORS, begins_run, chunk_place, chunk_rows, load_chunk, store_chunk
from lasp.kernels.triton.decay.channel.decays import (
    MIN_BASE_LOG2,
    base_operand,
    crosses,
    ends_chunk,
    gate_operand,
    in_base_block,
    is_done,
    is_late,
    load_channel_gates,
    load_intervals,
    load_sum,
    load_through,
    meets,
    prefix_sums,
    suffix_sums,
    sum_over,
    sums_before,
    sums_to_end,
)


@triton.jit(do_not_specialize=["scale", "T", "H", "H_g", "chunks"])
def channel_intra_chunk_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V], H_v = GROUP H_g
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [B, T, H_g, K]; GROUP value heads share one
    intervals_ptr,  # [LEVELS + 2, C, C], see `load_intervals`
    unbounded_ptr,  # int32 [B, H_g, chunks] if UNBOUNDED
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
    BV: tl.constexpr,  # columns of v and do at a time
    C: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    FROM_ZERO: tl.constexpr,  # whether no run has an initial state
    GROUP: tl.constexpr,
    BASE: tl.constexpr,
    LEVELS: tl.constexpr,
    UNBOUNDED: tl.constexpr,  # as in channel_prepare
):
    slices: tl.constexpr = (K + BK - 1) // BK
    part, run, chunk, qk_row, row = chunk_rows(slices, chunks, T, H, H_g)
    if is_done(unbounded_ptr, chunk, UNBOUNDED):
        return
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
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

    gates = load_channel_gates(g_at, first, last, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    d_scores = tl.zeros((C, C), tl.float32)
    transposed = tl.zeros((C, C), tl.float32)
    for each in tl.static_range(GROUP):
        for v_first in range(0, V, BV):
            v = load_chunk(v_at + each * V, first, v_first, last, v_row, V, C, BV, DESCRIPTORS)
            do = load_chunk(do_at + each * V, first, v_first, last, v_row, V, C, BV, DESCRIPTORS)
            d_scores = tl.dot(do, tl.trans(v), d_scores, input_precision=PRECISION)
            # A product of its own: see docs/design/kernels.md on transposed accumulators.
            transposed = tl.dot(v, tl.trans(do), transposed, input_precision=PRECISION)
    symmetric = tl.where(i >= j, d_scores, transposed) * scale
    diagonal = tl.sum(tl.where(i == j, symmetric, 0.0), 1)[:, None]
    symmetric = symmetric.to(dtype)
    dq = tl.zeros((C, BK), tl.float32)
    dk = tl.zeros((C, BK), tl.float32)
    dq_at = dq_ptr + out
    dk_at = dk_ptr + out
    dg_at = dg_ptr + out
    if BASE > 0:
        to_middle = sum_over(load_intervals(intervals_ptr, -1, C), base_operand(gates, dtype))
        to_q = tl.exp2(to_middle)
        to_k = tl.exp2(-to_middle)
        block = tl.where(in_base_block(BASE, C), symmetric, 0.0)
        k = load_chunk(k_at, first, k_first, last, H * K, K, C, BK, DESCRIPTORS)
        near_k = (k * to_k).to(dtype)
        d_q = tl.dot(tl.where(i > j, block, 0.0), near_k, input_precision=PRECISION)
        q = load_chunk(q_at, first, k_first, last, H * K, K, C, BK, DESCRIPTORS)
        near_q = (q * to_q).to(dtype)
        dq = to_q * d_q
        d_k = tl.dot(tl.where(i < j, block, 0.0), near_q, input_precision=PRECISION)
        dk = to_k * d_k
        within = sums_to_end(near_q * d_q - near_k * d_k, dtype, C)
        # What crosses a token whose gate is beyond the floor of `base_operand` is decayed by the rest of it too. It is
        # kept in dk's place.
        within *= tl.exp2(tl.minimum(gates - MIN_BASE_LOG2, 0.0))
        store_chunk(dk_at, within.to(dk_ptr.dtype.element_ty), first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    terms = tl.zeros((C, BK), tl.float32)
    # q dq - k dk of pairs, with operands as rounded: so those that do not cross a token cancel in its sum; or if EXACT
    # sums over those that do. They are kept in dg until the others are taken: a third tile would not fit registers.
    store_chunk(dg_at, terms, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    operand = gate_operand(gates, dtype)
    # q's rows and k's lie apart by the same strides, so one load reads late rows from q and early ones from k.
    offsets = tl.arange(0, C)[:, None] * (H * K) + (k_first + tl.arange(0, BK))[None, :]
    inside = (first + tl.arange(0, C) < last)[:, None] & (k_first + tl.arange(0, BK) < K)[None, :]
    rows = qk + tl.cast(first, tl.int64) * (H * K)
    for level in range(BASE, LEVELS):
        late = is_late(level, C)
        x = tl.load(tl.where(late, q_ptr + rows, k_ptr + rows) + offsets, mask=inside, other=0.0)
        decay = tl.exp2(sum_over(load_intervals(intervals_ptr, level, C), operand))
        x = (x * decay).to(dtype)
        d_met = tl.where(meets(level, C), symmetric, 0.0)
        met = tl.dot(d_met, x, input_precision=PRECISION)
        d_x = decay * met
        dq += tl.where(late, d_x, 0.0)
        dk += tl.where(late, 0.0, d_x)
        own = x * met
        # In fp32 what cannot cancel is not taken off: its rounding would be the same at all tokens before.
        own = sum_over(crosses(level, C), own) if EXACT else tl.where(late, own, -own)
        terms = load_chunk(dg_at, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS) + own
        store_chunk(dg_at, terms, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    # In an order that holds few tiles at a time. A token decays nothing between itself and itself: the diagonal is no
    # part of the gate's gradient.
    q = load_chunk(q_at, first, k_first, last, H * K, K, C, BK, DESCRIPTORS)
    dk += diagonal * q
    read_q = load_sum(read_q_ptr + out * GROUP, first, k_first, last, H_g, K, C, BK, GROUP) * (
        tl.exp2(prefix_sums(operand, C)) * scale
    )
    dq += read_q
    terms = q * read_q
    if not EXACT:
        terms += load_chunk(dg_at, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    k = load_chunk(k_at, first, k_first, last, H * K, K, C, BK, DESCRIPTORS)
    dq += diagonal * k
    read_k = load_sum(read_k_ptr + out * GROUP, first, k_first, last, H_g, K, C, BK, GROUP) * tl.exp2(
        suffix_sums(operand, C)
    )
    dk += read_k
    reads = tl.where(ends_chunk(first, last, C), 0.0, k * read_k)
    channel = k_first + tl.arange(0, BK)
    through = load_through(through_ptr, run, chunks, channel, K, GROUP)
    dg = sums_to_end(terms, dtype, C) + (sums_before(reads, dtype, C) + through[None, :])
    if EXACT:
        dg += load_chunk(dg_at, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    if BASE > 0:
        # Other threads may have stored it.
        tl.debug_barrier()
        dg += load_chunk(dk_at, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    store_chunk(dq_at, dq.to(dq_ptr.dtype.element_ty), first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    store_chunk(dk_at, dk.to(dk_ptr.dtype.element_ty), first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
    if FROM_ZERO:
        # Nothing precedes a run's first token: exactly, not but for rounding.
        dg = tl.where((i == 0) & begins_run(places_ptr, tl.program_id(1), PACKED), 0.0, dg)
    store_chunk(dg_at, dg, first, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
