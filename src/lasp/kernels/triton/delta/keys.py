"""From the first chunk of a segment to its last: the gradients of q, k, beta and the gate per token.

    dP = scale tril(do u^T G),   dM = -strict(dv u^T G)
    dq = scale 2^prefix do S^T + dP k
    dk = [2^suffix u D^T + dP^T q + dM^T k] as it is written + [dM k - 2^prefix dv S^T] as it reads
    dbeta = diag(dv u^T) / beta^2

S is made again from u, D was left at every chunk's end. The gate's gradient is what crosses a token t of the chunk:

    dg_t = <2^total S, D> + sum_{i >= t} reads_i + sum_{j < t} writes_j + sum_{i >= t > j} w_ij
    reads_i = q_i . (scale 2^prefix do S^T)_i - k_i . (2^prefix dv S^T)_i
    writes_j = k_j . (2^suffix u D^T)_j
    w_ij = (q_i . k_j) dP_ij + (k_i . k_j) dM_ij

Nothing is summed here that does not cross the token and would have to cancel: where a head forgets within a few tokens,
its gradient is as small as what is left. All of it is linear in the channels, so a program adds up those it has.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_chunk, state_tile, store_chunk, view
from lasp.kernels.triton.decay.gates import TOKEN
from lasp.kernels.triton.decay.place import place
from lasp.kernels.triton.delta.chunk import between, lengths, token_sums


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_keys_kernel(
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
    d_chunks_ptr,  # [B, H_v, chunks, BV, columns]: D^T at the end of each chunk
    dq_ptr,  # [B, T, H_v, K], written
    dk_ptr,  # likewise
    d_beta_ptr,  # fp32 [B, T, H_v], written
    dg_ptr,  # fp32 [slices, B, T, H_v], written if GATE
    places_ptr,  # int32 [segments, 7] if PACKED
    entering_ptr,  # fp32 [B, H_v, segments, K, V]: S at the start of each segment, or None for zero
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
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GATE: tl.constexpr,  # whether the gate's gradient is wanted
    COLUMNS: tl.constexpr,  # of d_chunks
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (K + BK - 1) // BK
    part, head, batch, segment, first, last, chunk, _border, _ends = place(
        places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED
    )
    dtype = k_ptr.dtype.element_ty
    column = part * BK
    row = tl.cast(batch, tl.int64) * T
    run = tl.cast(batch, tl.int64) * H_v + head
    key_head = head // (H_v // H)
    qk = (row * H + key_head) * K
    vo = (row * H_v + head) * V
    out = (row * H_v + head) * K
    q_view = view(q_ptr + qk, last, H * K, K, C, BK, DESCRIPTORS)
    k_view = view(k_ptr + qk, last, H * K, K, C, BK, DESCRIPTORS)
    do_view = view(do_ptr + vo, last, H_v * V, V, C, BV, DESCRIPTORS)
    u_view = view(u_ptr + vo, last, H_v * V, V, C, BV, DESCRIPTORS)
    dv_view = view(dv_ptr + vo, last, H_v * V, V, C, BV, DESCRIPTORS)
    # Descriptors store from shared memory, which twice as wide gradients (fp32, of grouped heads) would overfill.
    STORES: tl.constexpr = DESCRIPTORS and dq_ptr.dtype.element_ty == dtype
    dq_view = view(dq_ptr + out, last, H_v * K, K, C, BK, STORES)
    dk_view = view(dk_ptr + out, last, H_v * K, K, C, BK, STORES)
    count = tl.cdiv(last - first, C)
    slot = (run * chunks + chunk) * C
    d_chunks = view(
        d_chunks_ptr + (run * chunks + chunk) * (BV * COLUMNS), count * BV, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS
    )
    norms_at = ((tl.cast(batch, tl.int64) * H + key_head) * chunks + chunk) * C
    tokens = row * H_v + head
    if KIND == TOKEN:
        g_ptr += tokens

    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    state = tl.zeros((BK, BV), tl.float32)
    if entering_ptr is not None:
        entering, mask = state_tile(entering_ptr + (run * segments + segment) * K * V, column, 0, K, V, V, 1, BK, BV)
        state = tl.load(entering, mask=mask, other=0.0)
    for c in range(count):
        start = first + c * C
        q_t = tl.trans(load_chunk(q_view, start, column, last, H * K, K, C, BK, DESCRIPTORS))
        k_t = tl.trans(load_chunk(k_view, start, column, last, H * K, K, C, BK, DESCRIPTORS))
        do_t = tl.trans(load_chunk(do_view, start, 0, last, H_v * V, V, C, BV, DESCRIPTORS))
        u = load_chunk(u_view, start, 0, last, H_v * V, V, C, BV, DESCRIPTORS)
        d_v = load_chunk(dv_view, start, 0, last, H_v * V, V, C, BV, DESCRIPTORS)
        d_state = tl.trans(load_chunk(d_chunks, c * BV, column, count * BV, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS))
        prefix, suffix, total = token_sums(prefix_ptr, suffix_ptr, slot + c * C, KIND, C, EXACT)
        q_norms = lengths(q_norms_ptr, norms_at + c * C, C, NORMALIZE) * scale
        k_norms = lengths(k_norms_ptr, norms_at + c * C, C, NORMALIZE)
        from_start = tl.exp2(prefix)
        to_end = tl.exp2(suffix) * k_norms
        u_t = tl.trans(u)
        # [j, i]: what token i's output takes of u_j; [i, j]: what token i erases of it.
        pairs = between(g_ptr, H_v, prefix, start, last, KIND, C, False, EXACT) * q_norms[None, :]
        if NORMALIZE:
            pairs *= k_norms[:, None]
        z_t = tl.dot(u, do_t, input_precision=PRECISION) * pairs
        m = tl.dot(d_v, u_t, input_precision=PRECISION)
        if part == 0:
            # u is beta times what was missing, dv beta times its gradient.
            beta = tl.load(beta_ptr + slot + c * C + tl.arange(0, C))
            d_beta = tl.sum(tl.where(i == j, m, 0.0), 1) / beta / beta
            at = tokens + tl.cast(start + tl.arange(0, C), tl.int64) * H_v
            tl.store(d_beta_ptr + at, d_beta, mask=start + tl.arange(0, C) < last)
        pairs = between(g_ptr, H_v, prefix, start, last, KIND, C, True, EXACT)
        if NORMALIZE:
            pairs *= k_norms[:, None] * k_norms[None, :]
        m = tl.where(i > j, -m * pairs, 0.0)
        if GATE:
            crossing = tl.where(i < j, z_t * tl.dot(tl.trans(k_t), q_t, input_precision=PRECISION), 0.0)
            gained = tl.sum(crossing, 1)
            lost = tl.sum(crossing, 0)
            crossing = m * tl.dot(tl.trans(k_t), k_t, input_precision=PRECISION)
            gained += tl.sum(crossing, 0)
            lost += tl.sum(crossing, 1)
        z_t = z_t.to(dtype)
        m = m.to(dtype)
        rounded = state.to(dtype)
        acc = tl.dot(rounded, do_t, input_precision=PRECISION) * (from_start * q_norms)[None, :]
        if GATE:
            reads = q_t.to(tl.float32) * acc
        acc = tl.dot(k_t, z_t, acc, input_precision=PRECISION)
        store_chunk(dq_view, tl.trans(acc).to(dq_ptr.dtype.element_ty), start, column, last, H_v * K, K, C, BK, STORES)
        acc = tl.dot(rounded, tl.trans(d_v), input_precision=PRECISION) * -(from_start * k_norms)[None, :]
        if GATE:
            reads += k_t.to(tl.float32) * acc
            reads_of = tl.sum(reads, 0)
        acc = tl.dot(k_t, tl.trans(m), acc, input_precision=PRECISION)
        acc = tl.dot(q_t, tl.trans(z_t), acc, input_precision=PRECISION)
        acc = tl.dot(k_t, m, acc, input_precision=PRECISION)
        of_state = tl.dot(d_state, u_t, input_precision=PRECISION) * to_end[None, :]
        acc += of_state
        store_chunk(dk_view, tl.trans(acc).to(dk_ptr.dtype.element_ty), start, column, last, H_v * K, K, C, BK, STORES)
        if GATE:
            gained += tl.sum(k_t.to(tl.float32) * of_state, 0)
            across = tl.sum(tl.sum(state * d_state.to(tl.float32), 1), 0) * tl.exp2(total)
            d_g = across + tl.sum(tl.where(i < j, (gained - lost)[:, None], reads_of[:, None]), 0)
            at = tl.cast(part, tl.int64) * B * T * H_v + tokens
            at += tl.cast(start + tl.arange(0, C), tl.int64) * H_v
            tl.store(dg_ptr + at, d_g, mask=start + tl.arange(0, C) < last)
        weighted = (u.to(tl.float32) * to_end[:, None]).to(dtype)
        state = tl.dot(k_t, weighted, state * tl.exp2(total), input_precision=PRECISION)
