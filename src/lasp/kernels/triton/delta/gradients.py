# mypy: ignore-errors
"""The gradients of q, k, beta and a gate per token, chunk by chunk.

    dP = scale tril(do u^T G),   dM = -strict(dv u^T G)
    dq = scale 2^prefix do S^T + dP k
    dk = [2^suffix u D^T + dP^T q + dM^T k] as it is written + [dM k - 2^prefix dv S^T] as it reads
    dbeta = diag(dv u^T) / beta^2

The gate's gradient is what crosses a token t of the chunk:

    dg_t = <2^total S, D> + sum_{i >= t} reads_i + sum_{j < t} writes_j + sum_{i >= t > j} w_ij
    reads_i = q_i . (scale 2^prefix do S^T)_i - k_i . (2^prefix dv S^T)_i
    writes_j = k_j . (2^suffix u D^T)_j
    w_ij = (q_i . k_j) dP_ij + (k_i . k_j) dM_ij

Nothing is summed here that does not cross the token and would have to cancel: where a head forgets within a few tokens,
its gradient is as small as what is left. All of it is linear in the channels, so a program adds up those it has.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import TOKEN
from lasp.kernels.triton.common.program import load_chunk, place, store_chunk, view
from lasp.kernels.triton.delta.chunk import between, lengths, token_pairs, token_sums
from lasp.kernels.triton.delta.within import (
    between_tokens,
    from_state,
    state_tile_of,
    store_d_beta,
    token_tile,
)


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_gradients_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    do_ptr,  # [B, T, H_v, V]
    u_ptr,  # [B, T, H_v, V]
    dv_ptr,  # [B, T, H_v, V]
    beta_ptr,  # fp32 [B, H_v, chunks C]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    g_ptr,  # fp32 [B, T, H_v] if TOKEN
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    suffix_ptr,  # likewise, and EXACT
    passing_ptr,  # fp32 [PASSING, B, H_v, chunks], if GATE: in parts, what passes each chunk
    s_chunks_ptr,  # [B, H_v, chunks, ROWS, COLUMNS]: S^T at the start of each chunk
    d_chunks_ptr,  # likewise: D^T at the end of each chunk
    dq_ptr,  # [B, T, H_v, K], written
    dk_ptr,  # likewise
    d_beta_ptr,  # fp32 [B, T, H_v], written
    dg_ptr,  # fp32 [slices, B, T, H_v], written if GATE
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
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GATE: tl.constexpr,  # whether the gate's gradient is wanted
    PASSING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (K + BK - 1) // BK
    part, head, batch, _segment, first, last, chunk, _border, _ends = place(
        places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED
    )
    dtype = k_ptr.dtype.element_ty
    column = part * BK
    token = tl.cast(batch, tl.int64) * T
    key_head = head // (H_v // H)
    qk = (token * H + key_head) * K
    tokens = token * H_v + head
    row = H_v * V
    q_view = view(q_ptr + qk, last, H * K, K, C, BK, DESCRIPTORS)
    do_view = view(do_ptr + tokens * V, last, row, V, C, BV, DESCRIPTORS)
    u_view = view(u_ptr + tokens * V, last, row, V, C, BV, DESCRIPTORS)
    dv_view = view(dv_ptr + tokens * V, last, row, V, C, BV, DESCRIPTORS)
    # Descriptors store from shared memory, which twice as wide gradients (fp32, of grouped heads) would overfill.
    STORES: tl.constexpr = DESCRIPTORS and dq_ptr.dtype.element_ty == dtype
    dq_view = view(dq_ptr + tokens * K, last, H_v * K, K, C, BK, STORES)
    dk_view = view(dk_ptr + tokens * K, last, H_v * K, K, C, BK, STORES)
    count = tl.cdiv(last - first, C)
    at = (tl.cast(batch, tl.int64) * H_v + head) * chunks + chunk
    rows = count * ROWS
    s_view = view(s_chunks_ptr + at * (ROWS * COLUMNS), rows, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS)
    d_view = view(d_chunks_ptr + at * (ROWS * COLUMNS), rows, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS)
    norms_at = ((tl.cast(batch, tl.int64) * H + key_head) * chunks + chunk) * C
    if KIND == TOKEN:
        g_ptr += tokens
    d_beta_ptr += tokens
    dg_ptr += tl.cast(part, tl.int64) * B * T * H_v + tokens
    for c in range(count):
        start = first + c * C
        i, j = token_pairs(C)
        here = c * ROWS
        slot = at * C + c * C
        u = token_tile(u_view, start, last, row, V, BV, C, DESCRIPTORS)
        do = token_tile(do_view, start, last, row, V, BV, C, DESCRIPTORS)
        q = load_chunk(q_view, start, column, last, H * K, K, C, BK, DESCRIPTORS)
        # Of the copy engine's tiles Triton 3.7.1 takes none for both sides of a product.
        k = load_chunk(k_ptr + qk, start, column, last, H * K, K, C, BK, False)
        state = state_tile_of(s_view, here, rows, column, V, BV, BK, COLUMNS, DESCRIPTORS)
        dv = token_tile(dv_view, start, last, row, V, BV, C, DESCRIPTORS)
        d_state = state_tile_of(d_view, here, rows, column, V, BV, BK, COLUMNS, DESCRIPTORS)
        prefix, suffix, _total = token_sums(prefix_ptr, suffix_ptr, slot, KIND, C, EXACT)
        q_norms = lengths(q_norms_ptr, norms_at + c * C, C, NORMALIZE) * scale
        k_norms = lengths(k_norms_ptr, norms_at + c * C, C, NORMALIZE)
        # Rows are those that read, then those that are read. In an order that holds few tiles at a time.
        pairs = between(g_ptr, H_v, prefix, start, last, KIND, C, True, EXACT)
        if NORMALIZE:
            pairs *= k_norms[None, :]
        z = between_tokens(do, u, do_view, u_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION)
        z *= pairs * q_norms[:, None]
        if GATE:
            # [t, j]: what reads j from t on; of j before t.
            crossing = tl.where(i > j, z * tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
        dq = from_state(
            do, state, do_view, s_view, start, last, row, here, rows, column, V, BV, BK, C, COLUMNS, DESCRIPTORS,
            PRECISION,
        ) * (tl.exp2(prefix) * q_norms)[:, None]  # fmt: skip
        if GATE:
            reads = tl.sum(q.to(tl.float32) * dq, 1)
        dq = tl.dot(z.to(dtype), k, dq, input_precision=PRECISION)
        store_chunk(dq_view, dq.to(dq_ptr.dtype.element_ty), start, column, last, H_v * K, K, C, BK, STORES)

        m = between_tokens(dv, u, dv_view, u_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION)
        if part == 0:
            store_d_beta(d_beta_ptr, beta_ptr + slot, m, start, last, H_v, C)
        m = tl.where(i > j, -m * pairs, 0.0)
        if NORMALIZE:
            m *= k_norms[:, None]
        if GATE:
            crossing += m * tl.dot(k, tl.trans(k), input_precision=PRECISION)
            gained = tl.sum(crossing, 0)
            lost = tl.sum(crossing, 1)
        dk = from_state(
            dv, state, dv_view, s_view, start, last, row, here, rows, column, V, BV, BK, C, COLUMNS, DESCRIPTORS,
            PRECISION,
        ) * -(tl.exp2(prefix) * k_norms)[:, None]  # fmt: skip
        if GATE:
            reads += tl.sum(k.to(tl.float32) * dk, 1)
        dk = tl.dot(m.to(dtype), k, dk, input_precision=PRECISION)

        written = from_state(
            u, d_state, u_view, d_view, start, last, row, here, rows, column, V, BV, BK, C, COLUMNS, DESCRIPTORS,
            PRECISION,
        ) * (tl.exp2(suffix) * k_norms)[:, None]  # fmt: skip
        dk += written
        if GATE:
            gained += tl.sum(k.to(tl.float32) * written, 1)
            across = 0.0
            if part == 0:
                for n in range(PASSING):
                    across += tl.load(passing_ptr + tl.cast(n, tl.int64) * B * H_v * chunks + at + c)
            d_g = across + tl.sum(tl.where(i < j, (gained - lost)[:, None], reads[:, None]), 0)
            t = start + tl.arange(0, C)
            tl.store(dg_ptr + tl.cast(t, tl.int64) * H_v, d_g, mask=t < last)
        pairs = between(g_ptr, H_v, prefix, start, last, KIND, C, False, EXACT)
        if NORMALIZE:
            pairs *= k_norms[:, None]
        z = between_tokens(u, do, u_view, do_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION)
        z *= pairs * q_norms[None, :]
        dk = tl.dot(z.to(dtype), q, dk, input_precision=PRECISION)
        m = between_tokens(u, dv, u_view, dv_view, start, last, row, V, BV, C, DESCRIPTORS, PRECISION)
        m = tl.where(i < j, -m * pairs, 0.0)
        if NORMALIZE:
            m *= k_norms[None, :]
        dk = tl.dot(m.to(dtype), k, dk, input_precision=PRECISION)
        store_chunk(dk_view, dk.to(dk_ptr.dtype.element_ty), start, column, last, H_v * K, K, C, BK, STORES)
