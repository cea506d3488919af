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

from lasp.kernels.triton.common.tiles import load_chunk, store_chunk
from lasp.kernels.triton.decay.channel_gates import DESCRIPTORS
from lasp.kernels.triton.decay.gates import TOKEN
from lasp.kernels.triton.decay.place import chunk_place
from lasp.kernels.triton.delta.chunk import between, lengths, token_sums
from lasp.kernels.triton.delta.within import (
    between_tokens,
    from_state,
    paired,
    state_slice,
    store_d_beta,
    token_tile,
)

STEP = tl.constexpr(16)


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "chunks"])
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
    s_chunks_ptr,  # [B, H_v, chunks, ROWS, COLUMNS]: S^T at the start of each chunk
    d_chunks_ptr,  # likewise: D^T at the end of each chunk
    dq_ptr,  # [B, T, H_v, K], written
    dk_ptr,  # likewise
    d_beta_ptr,  # fp32 [B, T, H_v], written
    dg_ptr,  # fp32 [slices, B, T, H_v], written if GATE
    places_ptr,  # int32 [chunks, 3] if PACKED
    scale,
    B,
    T,
    H,
    H_v,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # channels a program has
    BV: tl.constexpr,  # columns of v, u, do at a time
    C: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GATE: tl.constexpr,  # whether the gate's gradient is wanted
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (K + BK - 1) // BK
    dtype = k_ptr.dtype.element_ty
    chunk = tl.program_id(0)
    part = tl.program_id(1) % slices
    head = tl.program_id(1) // slices % H_v
    batch = tl.cast(tl.program_id(1) // slices // H_v, tl.int64)
    at = (batch * H_v + head) * chunks + chunk
    column = part * BK
    first, last = chunk_place(places_ptr, chunk, T, C, PACKED)
    key_head = head // (H_v // H)
    qk = (batch * T * H + key_head) * K
    tokens = batch * T * H_v + head
    vo = tokens * V
    out = tokens * K
    norms_at = ((batch * H + key_head) * chunks + chunk) * C
    if KIND == TOKEN:
        g_ptr += tokens

    do_ptr += vo
    u_ptr += vo
    dv_ptr += vo
    s_chunks_ptr += at * (ROWS * COLUMNS)
    d_chunks_ptr += at * (ROWS * COLUMNS)
    row = H_v * V

    u = token_tile(u_ptr, first, last, row, V, BV, C)
    do = token_tile(do_ptr, first, last, row, V, BV, C)
    dv = token_tile(dv_ptr, first, last, row, V, BV, C)
    q = load_chunk(q_ptr + qk, first, column, last, H * K, K, C, BK, DESCRIPTORS)
    k = load_chunk(k_ptr + qk, first, column, last, H * K, K, C, BK, DESCRIPTORS)
    state = state_slice(s_chunks_ptr, column, V, BV, BK, COLUMNS)
    d_state = state_slice(d_chunks_ptr, column, V, BV, BK, COLUMNS)
    prefix, suffix, total = token_sums(prefix_ptr, suffix_ptr, at * C, KIND, C, EXACT)
    q_norms = lengths(q_norms_ptr, norms_at, C, NORMALIZE) * scale
    k_norms = lengths(k_norms_ptr, norms_at, C, NORMALIZE)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    # Rows are those that read; with _t, those that are read. In an order that holds few tiles at a time.
    pairs = between(g_ptr, H_v, prefix, first, last, KIND, C, True, EXACT)
    if NORMALIZE:
        pairs *= k_norms[None, :]
    z = between_tokens(do, u, do_ptr, u_ptr, first, last, row, V, BV, C, PRECISION)
    z *= pairs * q_norms[:, None]
    if GATE:
        # [t, j]: what reads j from t on; of j before t.
        crossing = tl.where(i > j, z * tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
        gained = tl.sum(crossing, 0)
        lost = tl.sum(crossing, 1)
    read = from_state(
        do, state, do_ptr, s_chunks_ptr, first, last, row, column, V, BV, BK, C, COLUMNS, PRECISION
    ) * (tl.exp2(prefix) * q_norms)[:, None]  # fmt: skip
    if GATE:
        reads = tl.sum(q.to(tl.float32) * read, 1)
    dq = tl.dot(z.to(dtype), k, read, input_precision=PRECISION)
    store_chunk(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), first, column, last, H_v * K, K, C, BK, DESCRIPTORS)

    m = between_tokens(dv, u, dv_ptr, u_ptr, first, last, row, V, BV, C, PRECISION)
    if part == 0:
        store_d_beta(d_beta_ptr + tokens, beta_ptr + at * C, m, first, last, H_v, C)
    m = tl.where(i > j, -m * pairs, 0.0)
    if NORMALIZE:
        m *= k_norms[:, None]
    if GATE:
        crossing = m * tl.dot(k, tl.trans(k), input_precision=PRECISION)
        gained += tl.sum(crossing, 0)
        lost += tl.sum(crossing, 1)
    dk = from_state(
        dv, state, dv_ptr, s_chunks_ptr, first, last, row, column, V, BV, BK, C, COLUMNS, PRECISION
    ) * -(tl.exp2(prefix) * k_norms)[:, None]  # fmt: skip
    if GATE:
        reads += tl.sum(k.to(tl.float32) * dk, 1)
    dk = tl.dot(m.to(dtype), k, dk, input_precision=PRECISION)

    written = from_state(
        u, d_state, u_ptr, d_chunks_ptr, first, last, row, column, V, BV, BK, C, COLUMNS, PRECISION
    ) * (tl.exp2(suffix) * k_norms)[:, None]  # fmt: skip
    dk += written
    if GATE:
        gained += tl.sum(k.to(tl.float32) * written, 1)
        across = tl.sum(paired(s_chunks_ptr, d_chunks_ptr, column, V, STEP, BK, COLUMNS), 0) * tl.exp2(total)
        d_g = across + tl.sum(tl.where(i < j, (gained - lost)[:, None], reads[:, None]), 0)
        t = tl.arange(0, C)
        to = tl.cast(part, tl.int64) * B * T * H_v + tokens + tl.cast(first + t, tl.int64) * H_v
        tl.store(dg_ptr + to, d_g, mask=first + t < last)
    pairs = between(g_ptr, H_v, prefix, first, last, KIND, C, False, EXACT)
    if NORMALIZE:
        pairs *= k_norms[:, None]
    z = between_tokens(u, do, u_ptr, do_ptr, first, last, row, V, BV, C, PRECISION)
    z *= pairs * q_norms[None, :]
    dk = tl.dot(z.to(dtype), q, dk, input_precision=PRECISION)
    m = between_tokens(u, dv, u_ptr, dv_ptr, first, last, row, V, BV, C, PRECISION)
    m = tl.where(i < j, -m * pairs, 0.0)
    if NORMALIZE:
        m *= k_norms[None, :]
    dk = tl.dot(m.to(dtype), k, dk, input_precision=PRECISION)
    store_chunk(dk_ptr + out, dk.to(dk_ptr.dtype.element_ty), first, column, last, H_v * K, K, C, BK, DESCRIPTORS)
