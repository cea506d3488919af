# mypy: ignore-errors
"""The gradients of q, k, beta and the gate for a gate per channel, put together chunk by chunk.

With z = scale tril(do u^T), m = -strict(dv u^T), both without decays:

    dq_i = sum_{j <= i} z_ij 2^between(i, j) k_j + scale 2^prefix_i (do S^T)_i
    dr_i = reads_i,  dk_i = writes_i
    reads_i  = sum_{j < i} m_ij 2^between(i, j) k_j - 2^prefix_i (dv S^T)_i
    writes_j = sum_{i >= j} 2^between(i, j) (z_ij q_i + m_ij r_i) + 2^suffix_j (u D^T)_j
    dg_t = sum_{s >= t} (q_s dq_s + r_s reads_s - k_s writes_s) + leaving            per channel, s within the chunk
    leaving = 2^total S D + sum_s k_s 2^suffix_s (u D^T)_s                           S D at the chunk's end

A token reads with k unless it has a key r of its own: k then has the sum of both gradients.
What pairs within the chunk add to dg cancels where it should, to fp32, since both sides take the same rounded operands.
Where gates forget, next to nothing may be left. So in fp32 what does not cross a token is not taken off but left out:
of pairs, and of the sum in `leaving` what it and later tokens add.
Where gates are bounded all tokens meet in the chunk's middle; other chunks go by levels, as in
`decay.channel.intra_chunk`.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import (
    DESCRIPTORS,
    begins_run,
    border_of,
    load_chunk,
    rows_of,
    run_of,
    slots_of,
    store_chunk,
)
from lasp.kernels.triton.decay.channel.decays import (
    MIN_BASE_LOG2,
    base_operand,
    crosses,
    gate_operand,
    in_base_block,
    is_late,
    load_channel_gates,
    load_intervals,
    meets,
)
from lasp.kernels.triton.delta.chunk import lengths
from lasp.kernels.triton.delta.within import (
    between_tokens,
    from_state_t,
    gradient_place,
    passing,
    placed_state,
    state_tile_of,
    store_d_beta,
    token_tile,
)


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "chunks"])
def delta_channel_gradients_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    r_ptr,  # likewise, if ERASES
    do_ptr,  # [B, T, H_v, V]
    u_ptr,  # [B, T, H_v, V]
    dv_ptr,  # [B, T, H_v, V]
    g_ptr,  # fp32 [B, T, H_v, K]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    beta_ptr,  # fp32 [B, H_v, chunks C]
    intervals_ptr,  # [LEVELS + 2, C, C], see `load_intervals`
    unbounded_ptr,  # int32 [B, H_v, chunks] if MARKED
    s_chunks_ptr,  # [B, H_v, chunks, ROWS, COLUMNS]: S^T at the start of each chunk; if PLACED dq's memory in k's dtype
    s_rest_ptr,  # if PLACED dk's memory, likewise
    s_tail_ptr,  # [B or documents, H_v, ROWS, COLUMNS] if PLACED: S^T at the start of each run's last chunk
    d_chunks_ptr,  # as s_chunks_ptr, of D^T at the end of each chunk; if PLACED dg's memory
    d_tail_ptr,  # as s_tail_ptr, of D^T
    dq_ptr,  # [B, T, H_v, K], written
    dk_ptr,  # likewise
    dr_ptr,  # likewise, if ERASES
    d_beta_ptr,  # fp32 [B, T, H_v], written
    dg_ptr,  # fp32 [B, T, H_v, K], written if GATE
    places_ptr,  # int32 [chunks, 4] if PACKED
    scale,
    B,
    T,
    H,
    H_v,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # channels a program has
    BV: tl.constexpr,  # columns of dv, u, do at a time
    C: tl.constexpr,
    ERASES: tl.constexpr,  # whether tokens read with a key of their own
    NORMALIZE: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BOUNDED: tl.constexpr,  # whether it does bounded chunks; if not others
    MARKED: tl.constexpr,  # whether chunks are either; if not, all are done
    BASE: tl.constexpr,
    LEVELS: tl.constexpr,
    PLACED: tl.constexpr,  # whether S and D lie in the place of gradients, of all chunks but those that are not full
    SPREAD: tl.constexpr,  # how many of k's elements one of dq's is long
    FROM_ZERO: tl.constexpr,  # whether no run has an initial state
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    here = gradient_place(places_ptr, (K + BK - 1) // BK, B, T, H_v, C, PACKED)
    at = run_of(here, H_v) * chunks + here.chunk
    if _is_others(unbounded_ptr, at, BOUNDED, MARKED):
        return
    start = here.first
    last = here.last
    column = here.part * BK
    key_row, tokens = rows_of(here, T, H, H_v)
    key_slot, _slot = slots_of(here, H, H_v, chunks, C)
    row = H_v * V
    keys = H_v * K
    q_ptr += key_row * K
    k_ptr += key_row * K
    do_ptr += tokens * V
    u_ptr += tokens * V
    dv_ptr += tokens * V
    dq_ptr += tokens * K
    dk_ptr += tokens * K
    dg_ptr += tokens * K
    if PLACED:
        border = border_of(places_ptr, here.chunk, here.batch, PACKED) * H_v + here.head
        token = tokens + tl.cast(start, tl.int64) * H_v
        s_chunks_ptr += (token * K + column) * SPREAD
        s_rest_ptr += (token * K + column) * SPREAD
        d_chunks_ptr += (token * K + column) * 2
        d_rest_ptr = d_chunks_ptr + BK
        s_row = tl.where(last - start < C, COLUMNS, H_v * K * SPREAD)
        d_row = tl.where(last - start < C, COLUMNS, H_v * K * 2)  # dg is fp32
        if last - start < C:
            s_chunks_ptr = s_tail_ptr + border * (ROWS * COLUMNS) + column
            s_rest_ptr = s_chunks_ptr + C * COLUMNS
            d_chunks_ptr = d_tail_ptr + border * (ROWS * COLUMNS) + column
            d_rest_ptr = d_chunks_ptr + C * COLUMNS
    else:
        s_chunks_ptr += at * (ROWS * COLUMNS)
        d_chunks_ptr += at * (ROWS * COLUMNS)
        d_rest_ptr, s_row, d_row = d_chunks_ptr, 0, 0
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]

    u = token_tile(u_ptr, start, last, row, V, BV, C)
    do = token_tile(do_ptr, start, last, row, V, BV, C)
    gates = tl.trans(load_channel_gates(g_ptr + tokens * K, start, last, column, last, keys, K, C, BK, DESCRIPTORS))
    operand = gate_operand(gates, dtype)
    q_norms = lengths(q_norms_ptr, key_slot, C, NORMALIZE)[None, :]
    k_norms = lengths(k_norms_ptr, key_slot, C, NORMALIZE)[None, :]
    q = load_chunk(q_ptr, start, column, last, H * K, K, C, BK, DESCRIPTORS)
    k = load_chunk(k_ptr, start, column, last, H * K, K, C, BK, DESCRIPTORS)
    q = tl.trans(q).to(tl.float32) * q_norms
    k = tl.trans(k).to(tl.float32) * k_norms
    r = k
    if ERASES:
        r = load_chunk(r_ptr + key_row * K, start, column, last, H * K, K, C, BK, DESCRIPTORS)
        r = tl.trans(r).to(tl.float32)
    state = _state(s_chunks_ptr, s_rest_ptr, s_row, column, V, BV, BK, C, COLUMNS, PLACED)
    z = between_tokens(do, u, do_ptr, u_ptr, start, last, row, V, BV, C, PRECISION) * scale
    if BOUNDED:
        # In an order that holds few tiles at a time.
        to_middle = _sums(operand, intervals_ptr, -2, C)
        # Of gates as rounded, so that they and `to_middle` cancel.
        rounded = operand.to(tl.float32)
        early = tl.exp2(tl.sum(tl.where(j < C // 2, rounded, 0.0), 1))
        late = tl.exp2(tl.sum(tl.where(j < C // 2, 0.0, rounded), 1))
        to = tl.exp2(to_middle)
        near_q = (q * to).to(dtype)
        near_r = (r * to).to(dtype)
        far_k = (k * tl.exp2(-to_middle)).to(dtype)
        z = tl.where(i >= j, z, 0.0).to(dtype)
        read = from_state_t(
            state, do, s_chunks_ptr, do_ptr, start, last, row, column, V, BV, BK, C, COLUMNS, PRECISION
        )  # fmt: skip
        d_q = tl.dot(far_k, tl.trans(z), read * (early * scale)[:, None], input_precision=PRECISION)
        if GATE:
            # Before dq takes the place of S. S and D are read once more rather than kept.
            d_state = _state(d_chunks_ptr, d_rest_ptr, d_row, column, V, BV, BK, C, COLUMNS, PLACED)
            once_more = _state(s_chunks_ptr, s_rest_ptr, s_row, column, V, BV, BK, C, COLUMNS, PLACED)
            passed = passing(once_more, d_state, s_chunks_ptr, d_chunks_ptr, column, V, BV, BK, COLUMNS)
        dq = tl.trans((to * d_q * q_norms).to(dq_ptr.dtype.element_ty))
        store_chunk(dq_ptr, dq, start, column, last, keys, K, C, BK, DESCRIPTORS)
        terms = near_q * d_q
        dv = token_tile(dv_ptr, start, last, row, V, BV, C)
        m = between_tokens(dv, u, dv_ptr, u_ptr, start, last, row, V, BV, C, PRECISION)
        if here.part == 0:
            store_d_beta(d_beta_ptr + tokens, beta_ptr + at * C, m, start, last, H_v, C)
        m = tl.where(i > j, -m, 0.0).to(dtype)
        read = from_state_t(
            state, dv, s_chunks_ptr, dv_ptr, start, last, row, column, V, BV, BK, C, COLUMNS, PRECISION
        )  # fmt: skip
        d_reads = tl.dot(far_k, tl.trans(m), read * -early[:, None], input_precision=PRECISION)
        terms += near_r * d_reads
        dr = to * d_reads
        d_state = _state(d_chunks_ptr, d_rest_ptr, d_row, column, V, BV, BK, C, COLUMNS, PLACED)
        written = from_state_t(
            d_state, u, d_chunks_ptr, u_ptr, start, last, row, column, V, BV, BK, C, COLUMNS, PRECISION
        ) * late[:, None]  # fmt: skip
        if GATE:
            leaving = tl.sum(far_k * written, 1)
            leaving += passed * early * late
        written = tl.dot(near_q, z, written, input_precision=PRECISION)
        written = tl.dot(near_r, m, written, input_precision=PRECISION)
        dk = written / to if ERASES else dr + written / to
        terms -= far_k * written
    else:
        if GATE:
            # Before dq takes the place of S. D is read once more rather than kept.
            d_state = _state(d_chunks_ptr, d_rest_ptr, d_row, column, V, BV, BK, C, COLUMNS, PLACED)
            passed = passing(state, d_state, s_chunks_ptr, d_chunks_ptr, column, V, BV, BK, COLUMNS)
        # What z gives before what m gives, since both at once would not fit registers.
        dq = from_state_t(
            state, do, s_chunks_ptr, do_ptr, start, last, row, column, V, BV, BK, C, COLUMNS, PRECISION
        ) * scale  # fmt: skip
        dq *= _decays_from_start(operand, C)
        terms = q * dq
        # A token decays nothing between itself and itself: the diagonal is no part of the gate's gradient.
        diagonal = tl.sum(tl.where(i == j, z, 0.0), 0)[None, :]
        dq += diagonal * k
        dk = diagonal * q
        z_t = between_tokens(u, do, u_ptr, do_ptr, start, last, row, V, BV, C, PRECISION) * scale
        z = _both_halves(z, z_t, dtype, C)
        crossing = tl.zeros_like(terms)
        if BASE > 0:
            to_middle = _sums(base_operand(gates, dtype), intervals_ptr, -1, C)
            block = in_base_block(BASE, C)
            far = (k * tl.exp2(-to_middle)).to(dtype)
            found = tl.dot(far, tl.where(block & (i < j), z, 0.0), input_precision=PRECISION)
            near = (q * tl.exp2(to_middle)).to(dtype)
            own = near * found
            dq += tl.exp2(to_middle) * found
            found = tl.dot(near, tl.where(block & (i > j), z, 0.0), input_precision=PRECISION)
            own -= far * found
            crossing = _sums_to_end(own, crossing, dtype, C)
            dk += tl.exp2(-to_middle) * found
        for level in range(BASE, LEVELS):
            is_reading = tl.trans(is_late(level, C))
            decay = tl.exp2(_sums(operand, intervals_ptr, level, C))
            x = (tl.where(is_reading, q, k) * decay).to(dtype)
            found = tl.dot(x, tl.where(meets(level, C), z, 0.0), input_precision=PRECISION)
            own = x * found
            found *= decay
            dq += tl.where(is_reading, found, 0.0)
            dk += tl.where(is_reading, 0.0, found)
            if EXACT:
                crossing += tl.dot(own, tl.trans(crosses(level, C)).to(dtype), input_precision="ieee")
            else:
                terms += tl.where(is_reading, own, -own)
        dq = tl.trans((dq * q_norms).to(dq_ptr.dtype.element_ty))
        store_chunk(dq_ptr, dq, start, column, last, keys, K, C, BK, DESCRIPTORS)

        dv = token_tile(dv_ptr, start, last, row, V, BV, C)
        m = between_tokens(dv, u, dv_ptr, u_ptr, start, last, row, V, BV, C, PRECISION)
        if here.part == 0:
            store_d_beta(d_beta_ptr + tokens, beta_ptr + at * C, m, start, last, H_v, C)
        m_t = between_tokens(u, dv, u_ptr, dv_ptr, start, last, row, V, BV, C, PRECISION)
        m = _both_halves(-m, -m_t, dtype, C)
        dr = from_state_t(
            state, dv, s_chunks_ptr, dv_ptr, start, last, row, column, V, BV, BK, C, COLUMNS, PRECISION
        )  # fmt: skip
        dr *= -_decays_from_start(operand, C)
        terms += r * dr
        if not ERASES:
            dk += dr
        if BASE > 0:
            to_middle = _sums(base_operand(gates, dtype), intervals_ptr, -1, C)
            block = in_base_block(BASE, C)
            far = (k * tl.exp2(-to_middle)).to(dtype)
            found = tl.dot(far, tl.where(block & (i < j), m, 0.0), input_precision=PRECISION)
            near = (r * tl.exp2(to_middle)).to(dtype)
            own = near * found
            if ERASES:
                dr += tl.exp2(to_middle) * found
            else:
                dk += tl.exp2(to_middle) * found
            found = tl.dot(near, tl.where(block & (i > j), m, 0.0), input_precision=PRECISION)
            own -= far * found
            crossing = _sums_to_end(own, crossing, dtype, C)
            dk += tl.exp2(-to_middle) * found
        for level in range(BASE, LEVELS):
            is_reading = tl.trans(is_late(level, C))
            decay = tl.exp2(_sums(operand, intervals_ptr, level, C))
            x = (tl.where(is_reading, r, k) * decay).to(dtype)
            found = tl.dot(x, tl.where(meets(level, C), m, 0.0), input_precision=PRECISION)
            own = x * found
            found *= decay
            if ERASES:
                dr += tl.where(is_reading, found, 0.0)
                dk += tl.where(is_reading, 0.0, found)
            else:
                dk += found
            if EXACT:
                crossing += tl.dot(own, tl.trans(crosses(level, C)).to(dtype), input_precision="ieee")
            else:
                terms += tl.where(is_reading, own, -own)

        d_state = _state(d_chunks_ptr, d_rest_ptr, d_row, column, V, BV, BK, C, COLUMNS, PLACED)
        written = from_state_t(
            d_state, u, d_chunks_ptr, u_ptr, start, last, row, column, V, BV, BK, C, COLUMNS, PRECISION
        )  # fmt: skip
        written *= tl.exp2(tl.dot(operand, (i > j).to(operand.dtype), input_precision="ieee"))
        if GATE:
            leaving = passed * tl.exp2(tl.sum(operand.to(tl.float32), 1))
        if BASE > 0:
            # What crosses a token whose gate is beyond the floor of `base_operand` is decayed by the rest of it too.
            crossing *= tl.exp2(tl.minimum(gates - MIN_BASE_LOG2, 0.0))
        # Not the difference of all tokens' and later ones': where gates forget that would be their rounding.
        crossing = _sums_before(k * written, crossing, dtype, C)
        dk += written
    if ERASES:
        dr = tl.trans(dr.to(dr_ptr.dtype.element_ty))
        store_chunk(dr_ptr + tokens * K, dr, start, column, last, keys, K, C, BK, DESCRIPTORS)
    dk = tl.trans((dk * k_norms).to(dk_ptr.dtype.element_ty))
    store_chunk(dk_ptr, dk, start, column, last, keys, K, C, BK, DESCRIPTORS)
    if GATE:
        added = tl.zeros_like(terms) if BOUNDED else crossing
        dg = _sums_to_end(terms, added, dtype, C) + leaving[:, None]
        if FROM_ZERO:
            # Nothing precedes a run's first token: exactly, not but for rounding.
            dg = tl.where((j == 0) & begins_run(places_ptr, here.chunk, PACKED), 0.0, dg)
        store_chunk(dg_ptr, tl.trans(dg), start, column, last, keys, K, C, BK, DESCRIPTORS)


@triton.jit
def _state(
    first_ptr, rest_ptr, row, column, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    COLUMNS: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """[BV, BK] of a chunk's S^T or D^T; nothing if V does not fit."""
    if PLACED:
        return placed_state(first_ptr, rest_ptr, row, BV, BK, C)
    else:
        return state_tile_of(first_ptr, column, V, BV, BK, COLUMNS)


@triton.jit
def _is_others(unbounded_ptr, at, BOUNDED: tl.constexpr, MARKED: tl.constexpr):
    if MARKED:
        return (tl.load(unbounded_ptr + at) == 0) != BOUNDED
    else:
        return False


@triton.jit
def _decays_from_start(operand, C: tl.constexpr):
    """[BK, C]: from the chunk's start to each token, its own included."""
    up_to = tl.arange(0, C)[:, None] <= tl.arange(0, C)[None, :]
    return tl.exp2(tl.dot(operand, up_to.to(operand.dtype), input_precision="ieee"))


@triton.jit
def _both_halves(lower, upper, dtype: tl.constexpr, C: tl.constexpr):
    """A symmetric [C, C] of what lies below the diagonal, without one; upper: `lower` transposed, made as a product."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return tl.where(i > j, lower, tl.where(i < j, upper, 0.0)).to(dtype)


@triton.jit
def _sums(operand, intervals_ptr, level, C: tl.constexpr):
    """[BK, C]: of gates [BK, C] over a level's intervals, see `load_intervals`."""
    interval = tl.trans(load_intervals(intervals_ptr, level, C)).to(operand.dtype)
    return tl.dot(operand, interval, input_precision="ieee")


@triton.jit
def _sums_to_end(terms, added, dtype: tl.constexpr, C: tl.constexpr):
    """[BK, C]: each token's term and those of all later tokens of the chunk, and what is `added`."""
    if dtype == tl.bfloat16:
        return _sum_over_terms(terms, added, tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :])
    else:
        # Terms, unlike gates, may exceed fp16.
        return tl.cumsum(terms, 1, reverse=True) + added


@triton.jit
def _sums_before(terms, added, dtype: tl.constexpr, C: tl.constexpr):
    """[BK, C]: the terms of all earlier tokens of the chunk, and what is `added`."""
    earlier = tl.arange(0, C)[:, None] < tl.arange(0, C)[None, :]
    if dtype == tl.bfloat16:
        return _sum_over_terms(terms, added, earlier)
    else:
        return tl.dot(terms, earlier.to(dtype), added, input_precision="ieee")


@triton.jit
def _sum_over_terms(terms, added, interval):
    """Terms [BK, C], in two parts, each as products of bf16 take it, times an interval [C, C], and what is `added`."""
    high = terms.to(tl.bfloat16)
    low = (terms - high.to(tl.float32)).to(tl.bfloat16)
    interval = interval.to(tl.bfloat16)
    return tl.dot(low, interval, tl.dot(high, interval, added))
