# mypy: ignore-errors
"""The gradients of q, k, beta and a gate per token, chunk by chunk.

    dP = scale tril(do u^T G),   dM = -strict(dv u^T G)
    dq = scale 2^prefix do S^T + dP k
    dk = 2^suffix u D^T + dP^T q + dM^T r
    dr = dM k - 2^prefix dv S^T
    dbeta = diag(dv u^T) / beta^2

The gate's gradient is what crosses a token t of the chunk:

    dg_t = <2^total S, D> + sum_{i >= t} reads_i + sum_{j < t} writes_j + sum_{i >= t > j} w_ij
    reads_i = q_i . (scale 2^prefix do S^T)_i - r_i . (2^prefix dv S^T)_i
    writes_j = k_j . (2^suffix u D^T)_j
    w_ij = (q_i . k_j) dP_ij + (r_i . k_j) dM_ij

A token reads with k unless it has a key r of its own: k then has the sum of both gradients.
Nothing is summed here that does not cross the token and would have to cancel: where a head forgets within a few tokens,
its gradient is as small as what is left. All of it is linear in the channels, so a program adds up those it has.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import TOKEN
from lasp.kernels.triton.common.program import DESCRIPTORS, load_chunk, rows_of, run_of, slots_of, store_chunk
from lasp.kernels.triton.delta.chunk import between, lengths, token_pairs, token_sums
from lasp.kernels.triton.delta.within import (
    between_tokens,
    from_state,
    gradient_place,
    passing,
    state_tile_of,
    store_d_beta,
    token_tile,
)


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "chunks"])
def delta_gradients_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    r_ptr,  # likewise, if ERASES
    do_ptr,  # [B, T, H_v, V]
    u_ptr,  # [B, T, H_v, V]
    dv_ptr,  # [B, T, H_v, V]
    beta_ptr,  # fp32 [B, H_v, chunks C]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    g_ptr,  # fp32 [B, T, H_v] if TOKEN
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    suffix_ptr,  # likewise, and EXACT
    s_chunks_ptr,  # [B, H_v, chunks, ROWS, COLUMNS]: S^T at the start of each chunk
    d_chunks_ptr,  # likewise: D^T at the end of each chunk
    dq_ptr,  # [B, T, H_v, K], written
    dk_ptr,  # likewise
    dr_ptr,  # likewise, if ERASES
    d_beta_ptr,  # fp32 [B, T, H_v], written
    dg_ptr,  # fp32 [slices, B, T, H_v], written if GATE
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
    KIND: tl.constexpr,
    ERASES: tl.constexpr,  # whether tokens read with a key of their own
    EXACT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GATE: tl.constexpr,  # whether the gate's gradient is wanted
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    here = gradient_place(places_ptr, (K + BK - 1) // BK, B, T, H_v, C, PACKED)
    start = here.first
    last = here.last
    dtype = k_ptr.dtype.element_ty
    column = here.part * BK
    key_row, tokens = rows_of(here, T, H, H_v)
    key_slot, _slot = slots_of(here, H, H_v, chunks, C)
    row = H_v * V
    q_ptr += key_row * K
    k_ptr += key_row * K
    do_ptr += tokens * V
    u_ptr += tokens * V
    dv_ptr += tokens * V
    at = run_of(here, H_v) * chunks + here.chunk
    s_chunks_ptr += at * (ROWS * COLUMNS)
    d_chunks_ptr += at * (ROWS * COLUMNS)
    if KIND == TOKEN:
        g_ptr += tokens
    i, j = token_pairs(C)

    u = token_tile(u_ptr, start, last, row, V, BV, C)
    do = token_tile(do_ptr, start, last, row, V, BV, C)
    q = load_chunk(q_ptr, start, column, last, H * K, K, C, BK, DESCRIPTORS)
    k = load_chunk(k_ptr, start, column, last, H * K, K, C, BK, DESCRIPTORS)
    r = k
    if ERASES:
        r = load_chunk(r_ptr + key_row * K, start, column, last, H * K, K, C, BK, DESCRIPTORS)
    prefix, suffix, total = token_sums(prefix_ptr, suffix_ptr, at * C, KIND, C, EXACT)
    q_norms = lengths(q_norms_ptr, key_slot, C, NORMALIZE) * scale
    k_norms = lengths(k_norms_ptr, key_slot, C, NORMALIZE)
    # Rows are those that read, columns those that are read; transposes are products of their own. In an order that
    # holds few tiles at a time.
    pairs = between(g_ptr, H_v, prefix, start, last, KIND, C, True, EXACT)
    if NORMALIZE:
        pairs *= k_norms[None, :]
    z = between_tokens(do, u, do_ptr, u_ptr, start, last, row, V, BV, C, PRECISION) * (pairs * q_norms[:, None])
    if GATE:
        # [t, j]: what reads j from t on; of j before t.
        crossing = tl.where(i > j, z * tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
    z = z.to(dtype)
    state = state_tile_of(s_chunks_ptr, column, V, BV, BK, COLUMNS)
    dq = from_state(do, state, do_ptr, s_chunks_ptr, start, last, row, column, V, BV, BK, C, COLUMNS, PRECISION)
    dq *= (tl.exp2(prefix) * q_norms)[:, None]
    if GATE:
        reads = tl.sum(q.to(tl.float32) * dq, 1)
    dq = tl.dot(z, k, dq, input_precision=PRECISION)
    store_chunk(
        dq_ptr + tokens * K, dq.to(dq_ptr.dtype.element_ty), start, column, last, H_v * K, K, C, BK, DESCRIPTORS
    )

    dv = token_tile(dv_ptr, start, last, row, V, BV, C)
    m = between_tokens(dv, u, dv_ptr, u_ptr, start, last, row, V, BV, C, PRECISION)
    if here.part == 0:
        store_d_beta(d_beta_ptr + tokens, beta_ptr + at * C, m, start, last, H_v, C)
    m = tl.where(i > j, -m * pairs, 0.0)
    if NORMALIZE:
        m *= k_norms[:, None]
    if GATE:
        crossing += m * tl.dot(r, tl.trans(k), input_precision=PRECISION)
        gained = tl.sum(crossing, 0)
        lost = tl.sum(crossing, 1)
    m = m.to(dtype)
    dk = from_state(dv, state, dv_ptr, s_chunks_ptr, start, last, row, column, V, BV, BK, C, COLUMNS, PRECISION)
    dk *= -(tl.exp2(prefix) * k_norms)[:, None]
    if GATE:
        reads += tl.sum(r.to(tl.float32) * dk, 1)
    dk = tl.dot(m, k, dk, input_precision=PRECISION)
    if ERASES:
        dr = dk.to(dr_ptr.dtype.element_ty)
        store_chunk(dr_ptr + tokens * K, dr, start, column, last, H_v * K, K, C, BK, DESCRIPTORS)

    d_state = state_tile_of(d_chunks_ptr, column, V, BV, BK, COLUMNS)
    written = from_state(u, d_state, u_ptr, d_chunks_ptr, start, last, row, column, V, BV, BK, C, COLUMNS, PRECISION)
    written *= (tl.exp2(suffix) * k_norms)[:, None]
    dk = written if ERASES else dk + written
    if GATE:
        gained += tl.sum(k.to(tl.float32) * written, 1)
        # S is read once more rather than kept.
        once_more = state_tile_of(s_chunks_ptr, column, V, BV, BK, COLUMNS)
        across = tl.sum(passing(once_more, d_state, s_chunks_ptr, d_chunks_ptr, column, V, BV, BK, COLUMNS), 0)
        dg = across * tl.exp2(total) + tl.sum(tl.where(i < j, (gained - lost)[:, None], reads[:, None]), 0)
        t = start + tl.arange(0, C)
        dg_ptr += tl.cast(here.part, tl.int64) * B * T * H_v + tokens
        tl.store(dg_ptr + tl.cast(t, tl.int64) * H_v, dg, mask=t < last)
    pairs = between(g_ptr, H_v, prefix, start, last, KIND, C, False, EXACT)
    if NORMALIZE:
        pairs *= k_norms[:, None]
    z = between_tokens(u, do, u_ptr, do_ptr, start, last, row, V, BV, C, PRECISION) * (pairs * q_norms[None, :])
    dk = tl.dot(z.to(dtype), q, dk, input_precision=PRECISION)
    m = between_tokens(u, dv, u_ptr, dv_ptr, start, last, row, V, BV, C, PRECISION)
    m = tl.where(i < j, -m * pairs, 0.0)
    if NORMALIZE:
        m *= k_norms[None, :]
    dk = tl.dot(m.to(dtype), r, dk, input_precision=PRECISION)
    store_chunk(
        dk_ptr + tokens * K, dk.to(dk_ptr.dtype.element_ty), start, column, last, H_v * K, K, C, BK, DESCRIPTORS
    )
