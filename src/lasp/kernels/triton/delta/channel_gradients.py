# mypy: ignore-errors
"""The gradients of q, k, beta and the gate for a gate per channel, put together chunk by chunk.

With z = scale tril(do u^T), m = -strict(dv u^T), both without decays:

    dq_i = sum_{j <= i} z_ij 2^between(i, j) k_j + scale 2^prefix_i (do S^T)_i
    dk_i = reads_i + writes_i
    reads_i  = sum_{j < i} m_ij 2^between(i, j) k_j - 2^prefix_i (dv S^T)_i
    writes_j = sum_{i >= j} 2^between(i, j) (z_ij q_i + m_ij k_i) + 2^suffix_j (u D^T)_j
    dg_t = sum_{s >= t} (q_s dq_s + k_s reads_s - k_s writes_s) + leaving            per channel, s within the chunk
    leaving = 2^total S D + sum_s k_s 2^suffix_s (u D^T)_s                           S D at the chunk's end

What pairs within the chunk add to dg cancels where it should, to fp32, since both sides take the same rounded operands.
Where gates are mild all tokens meet in the chunk's middle; other chunks go by levels, as in `decay.channel_within`.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import load_chunk, place, run_bounds, store_chunk, view
from lasp.kernels.triton.decay.channel.decays import (
    base_operand,
    gate_operand,
    in_base_block,
    is_late,
    load_channel_gates,
    load_stretches,
    meets,
    prefix_sums,
    suffix_sums,
    sum_over,
    sums_to_end,
    sums_to_middle,
)
from lasp.kernels.triton.delta.chunk import lengths
from lasp.kernels.triton.delta.within import (
    between_tokens,
    from_state,
    state_tile_of,
    store_d_beta,
    token_tile,
)


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_channel_gradients_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    do_ptr,  # [B, T, H_v, V]
    u_ptr,  # [B, T, H_v, V]
    dv_ptr,  # [B, T, H_v, V]
    g_ptr,  # fp32 [B, T, H_v, K]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    beta_ptr,  # fp32 [B, H_v, chunks C]
    stretches_ptr,  # [LEVELS + 2, C, C], see `load_stretches`
    steep_ptr,  # int32 [B, H_v, chunks] if MARKED
    passing_ptr,  # fp32 [PASSING, B, H_v, chunks, K], if GATE: in parts, what passes each chunk
    s_chunks_ptr,  # [B, H_v, chunks, ROWS, COLUMNS]: S^T at the start of each chunk
    d_chunks_ptr,  # likewise: D^T at the end of each chunk
    dq_ptr,  # [B, T, H_v, K], written
    dk_ptr,  # likewise
    d_beta_ptr,  # fp32 [B, T, H_v], written
    dg_ptr,  # fp32 [B, T, H_v, K], written if GATE
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
    BK: tl.constexpr,  # channels a program has
    BV: tl.constexpr,  # columns of dv, u, do at a time
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GATE: tl.constexpr,
    PASSING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MILD: tl.constexpr,  # whether it does mild chunks; if not others
    MARKED: tl.constexpr,  # whether chunks are either; if not, all are done
    BASE: tl.constexpr,
    LEVELS: tl.constexpr,
    FROM_ZERO: tl.constexpr,  # whether no run has an initial state
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (K + BK - 1) // BK
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    part, head, batch, _segment, first, last, chunk, _border, _ends = place(
        places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED
    )
    begin, _end = run_bounds(places_ptr, T, PACKED)
    column = part * BK
    token = tl.cast(batch, tl.int64) * T
    key_head = head // (H_v // H)
    qk = (token * H + key_head) * K
    tokens = token * H_v + head
    row = H_v * V
    q_view = view(q_ptr + qk, last, H * K, K, C, BK, DESCRIPTORS)
    k_view = view(k_ptr + qk, last, H * K, K, C, BK, DESCRIPTORS)
    g_view = view(g_ptr + tokens * K, last, H_v * K, K, C, BK, DESCRIPTORS)
    do_view = view(do_ptr + tokens * V, last, row, V, C, BV, DESCRIPTORS)
    u_view = view(u_ptr + tokens * V, last, row, V, C, BV, DESCRIPTORS)
    dv_view = view(dv_ptr + tokens * V, last, row, V, C, BV, DESCRIPTORS)
    dq_at = dq_ptr + tokens * K
    dk_at = dk_ptr + tokens * K
    dg_at = dg_ptr + tokens * K
    count = tl.cdiv(last - first, C)
    at = (tl.cast(batch, tl.int64) * H_v + head) * chunks + chunk
    rows = count * ROWS
    s_view = view(s_chunks_ptr + at * (ROWS * COLUMNS), rows, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS)
    d_view = view(d_chunks_ptr + at * (ROWS * COLUMNS), rows, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS)
    norms_at = ((tl.cast(batch, tl.int64) * H + key_head) * chunks + chunk) * C
    d_beta_ptr += tokens
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    for c in range(count):
        here = c * ROWS
        start = first + c * C
        mine = c >= 0
        if MARKED:
            mine = (tl.load(steep_ptr + at + c) == 0) == MILD
        if mine:
            q_norms = lengths(q_norms_ptr, norms_at + c * C, C, NORMALIZE)[:, None]
            k_norms = lengths(k_norms_ptr, norms_at + c * C, C, NORMALIZE)[:, None]
            u = token_tile(u_view, start, last, row, V, BV, C, DESCRIPTORS)
            do = token_tile(do_view, start, last, row, V, BV, C, DESCRIPTORS)
            dv = token_tile(dv_view, start, last, row, V, BV, C, DESCRIPTORS)
            state = state_tile_of(s_view, here, rows, column, V, BV, BK, COLUMNS, DESCRIPTORS)
            d_state = state_tile_of(d_view, here, rows, column, V, BV, BK, COLUMNS, DESCRIPTORS)
            gates = load_channel_gates(g_view, start, last, column, last, H_v * K, K, C, BK, DESCRIPTORS)
            operand = gate_operand(gates, dtype)
            q = load_chunk(q_view, start, column, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32) * q_norms
            k = load_chunk(k_view, start, column, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32) * k_norms
            if MILD:
                # In an order that holds few tiles at a time.
                to_middle = sums_to_middle(stretches_ptr, operand, C)
                # Of gates as rounded, so that they and `to_middle` cancel.
                rounded = operand.to(tl.float32)
                early = tl.exp2(tl.sum(tl.where(i < C // 2, rounded, 0.0), 0))[None, :]
                late = tl.exp2(tl.sum(tl.where(i < C // 2, 0.0, rounded), 0))[None, :]
                to = tl.exp2(to_middle)
                near_q = (q * to).to(dtype)
                near_k = (k * to).to(dtype)
                far_k = (k * tl.exp2(-to_middle)).to(dtype)
                read = from_state(
                    do,
                    state,
                    do_view,
                    s_view,
                    start,
                    last,
                    row,
                    here,
                    rows,
                    column,
                    V,
                    BV,
                    BK,
                    C,
                    COLUMNS,
                    DESCRIPTORS,
                    PRECISION,
                )
                z = between_tokens(do, u, do_view, u_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION)
                z = tl.where(i >= j, z * scale, 0.0).to(dtype)
                d_q = tl.dot(z, far_k, read * (early * scale), input_precision=PRECISION)
                dq = to * d_q * q_norms
                store_chunk(dq_at, dq.to(dq_ptr.dtype.element_ty), start, column, last, H_v * K, K, C, BK, False)
                terms = near_q * d_q
                read = from_state(
                    dv,
                    state,
                    dv_view,
                    s_view,
                    start,
                    last,
                    row,
                    here,
                    rows,
                    column,
                    V,
                    BV,
                    BK,
                    C,
                    COLUMNS,
                    DESCRIPTORS,
                    PRECISION,
                )
                m = between_tokens(dv, u, dv_view, u_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION)
                if part == 0:
                    store_d_beta(d_beta_ptr, beta_ptr + (at + c) * C, m, start, last, H_v, C)
                m = tl.where(i > j, -m, 0.0).to(dtype)
                d_reads = tl.dot(m, far_k, -(read * early), input_precision=PRECISION)
                terms += near_k * d_reads
                written = from_state(
                    u, d_state, u_view, d_view, start, last, row, here, rows, column, V, BV, BK, C, COLUMNS,
                    DESCRIPTORS, PRECISION,
                ) * late  # fmt: skip
                if GATE:
                    leaving = tl.sum(far_k * written, 0)
                z = between_tokens(u, do, u_view, do_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION)
                z = tl.where(i <= j, z * scale, 0.0).to(dtype)
                written = tl.dot(z, near_q, written, input_precision=PRECISION)
                m = between_tokens(u, dv, u_view, dv_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION)
                m = tl.where(i < j, -m, 0.0).to(dtype)
                written = tl.dot(m, near_k, written, input_precision=PRECISION)
                dk = to * d_reads + tl.exp2(-to_middle) * written
                terms -= far_k * written
            else:
                z = between_tokens(do, u, do_view, u_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION) * scale
                m = between_tokens(dv, u, dv_view, u_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION)
                if part == 0:
                    store_d_beta(d_beta_ptr, beta_ptr + (at + c) * C, m, start, last, H_v, C)
                z_t = between_tokens(u, do, u_view, do_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION) * scale
                m_t = between_tokens(u, dv, u_view, dv_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION)
                dq = from_state(
                    do, state, do_view, s_view, start, last, row, here, rows, column, V, BV, BK, C, COLUMNS,
                    DESCRIPTORS, PRECISION,
                ) * scale  # fmt: skip
                dk = from_state(
                    dv,
                    state,
                    dv_view,
                    s_view,
                    start,
                    last,
                    row,
                    here,
                    rows,
                    column,
                    V,
                    BV,
                    BK,
                    C,
                    COLUMNS,
                    DESCRIPTORS,
                    PRECISION,
                )
                written = from_state(
                    u, d_state, u_view, d_view, start, last, row, here, rows, column, V, BV, BK, C, COLUMNS,
                    DESCRIPTORS, PRECISION,
                )  # fmt: skip
                diagonal = tl.sum(tl.where(i == j, z, 0.0), 1)[:, None]
                z = tl.where(i > j, z, tl.where(i < j, z_t, 0.0)).to(dtype)
                m = -tl.where(i > j, m, tl.where(i < j, m_t, 0.0))
                m = m.to(dtype)
                from_start = tl.exp2(prefix_sums(operand, C))
                dq *= from_start
                dk *= -from_start
                written *= tl.exp2(suffix_sums(operand, C))
                if GATE:
                    leaving = tl.sum(k * written, 0)
                terms = q * dq + k * dk - k * written
                # A token decays nothing between itself and itself: the diagonal is no part of the gate's gradient.
                dq += diagonal * k
                dk += written + diagonal * q
                if BASE > 0:
                    to_middle = sum_over(load_stretches(stretches_ptr, -1, C), base_operand(gates, dtype))
                    to = tl.exp2(to_middle)
                    back = tl.exp2(-to_middle)
                    block = in_base_block(BASE, C)
                    near_q = (q * to).to(dtype)
                    near_k = (k * to).to(dtype)
                    far_k = (k * back).to(dtype)
                    d_q = tl.dot(tl.where(block & (i > j), z, 0.0), far_k, input_precision=PRECISION)
                    dq += to * d_q
                    d_reads = tl.dot(tl.where(block & (i > j), m, 0.0), far_k, input_precision=PRECISION)
                    d_writes = tl.dot(tl.where(block & (i < j), z, 0.0), near_q, input_precision=PRECISION)
                    d_writes = tl.dot(tl.where(block & (i < j), m, 0.0), near_k, d_writes, input_precision=PRECISION)
                    dk += to * d_reads + back * d_writes
                    terms += near_q * d_q + near_k * d_reads - far_k * d_writes
                for level in range(BASE, LEVELS):
                    is_reading = is_late(level, C)
                    decay = tl.exp2(sum_over(load_stretches(stretches_ptr, level, C), operand))
                    met = meets(level, C)
                    x = (tl.where(is_reading, q, k) * decay).to(dtype)
                    found = tl.dot(tl.where(met, z, 0.0), x, input_precision=PRECISION)
                    d_x = decay * found
                    dq += tl.where(is_reading, d_x, 0.0)
                    dk += tl.where(is_reading, 0.0, d_x)
                    own = x * found
                    x = (k * decay).to(dtype)
                    found = tl.dot(tl.where(met, m, 0.0), x, input_precision=PRECISION)
                    dk += decay * found
                    own += x * found
                    terms += tl.where(is_reading, own, -own)
                dq *= q_norms
                store_chunk(dq_at, dq.to(dq_ptr.dtype.element_ty), start, column, last, H_v * K, K, C, BK, False)
            dk *= k_norms
            store_chunk(dk_at, dk.to(dk_ptr.dtype.element_ty), start, column, last, H_v * K, K, C, BK, False)
            if GATE:
                d = column + tl.arange(0, BK)
                for n in range(PASSING):
                    passing = passing_ptr + (tl.cast(n, tl.int64) * B * H_v * chunks + at + c) * K + d
                    leaving += tl.load(passing, mask=d < K, other=0.0)
                dg = sums_to_end(terms, dtype, C) + leaving[None, :]
                if FROM_ZERO:
                    # Nothing precedes a run's first token: exactly, not but for rounding.
                    dg = tl.where((i == 0) & (start == begin), 0.0, dg)
                store_chunk(dg_at, dg, start, column, last, H_v * K, K, C, BK, False)
