# mypy: ignore-errors
"""Outputs, what every token writes, and the state that leaves the run."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import CHANNEL, TOKEN
from lasp.kernels.triton.common.program import (
    load_chunk,
    place,
    rows_of,
    run_of,
    slots_of,
    state_tile,
    store_chunk,
    view,
)
from lasp.kernels.triton.delta.chunk import (
    after_chunk,
    between,
    entering_state,
    lengths,
    state_decay,
    token_sums,
    written,
)


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_output_kernel(
    q_ptr,  # [B, T, H, K]; with scale and decays if CHANNEL
    reading_ptr,  # [B, T, H, K]: what reads the state, k unless CHANNEL or ERASES
    storing_ptr,  # likewise: what it is written at, k unless CHANNEL
    v_ptr,  # [B, T, H_v, V]
    inverse_ptr,  # [B, H_v, chunks, C, C]: A - I
    scores_ptr,  # likewise: P, if CHANNEL
    beta_ptr,  # fp32 [B, H_v, chunks C]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    g_ptr,  # fp32 [B, T, H_v] if TOKEN
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    suffix_ptr,  # likewise, and EXACT
    totals_ptr,  # fp32 [B, H_v, chunks, K] if CHANNEL
    o_ptr,  # [B, T, H_v, V], written
    u_ptr,  # [B, T, H_v, V], written
    state_out_ptr,  # fp32 [B or documents, H_v, K, V], written
    places_ptr,  # int32 [segments, 7] if PACKED
    entering_ptr,  # fp32 [B, H_v, segments, K, V], or None for zero
    scale,
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
    ERASES: tl.constexpr,  # whether tokens read with a key of their own
    EXACT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WHOLE: tl.constexpr,  # whether runs are single segments, and what enters them is given for each run
    DESCRIPTORS: tl.constexpr,
    STORES: tl.constexpr,  # whether descriptors write too
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (V + BV - 1) // BV
    here = place(places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED)
    first = here.first
    last = here.last
    dtype = storing_ptr.dtype.element_ty
    column = here.part * BV
    run = run_of(here, H_v)
    key_row, row = rows_of(here, T, H, H_v)
    key_slot, slot = slots_of(here, H, H_v, chunks, C)
    q_view = view(q_ptr + key_row * K, last, H * K, K, C, BK, DESCRIPTORS)
    reading = view(reading_ptr + key_row * K, last, H * K, K, C, BK, DESCRIPTORS)
    storing = view(storing_ptr + key_row * K, last, H * K, K, C, BK, DESCRIPTORS)
    v_view = view(v_ptr + row * V, last, H_v * V, V, C, BV, DESCRIPTORS)
    o_view = view(o_ptr + row * V, last, H_v * V, V, C, BV, STORES)
    u_view = view(u_ptr + row * V, last, H_v * V, V, C, BV, STORES)
    count = tl.cdiv(last - first, C)
    inverses = view(inverse_ptr + slot * C, count * C, C, C, C, C, DESCRIPTORS)
    scores = view(scores_ptr + slot * C, count * C, C, C, C, C, DESCRIPTORS)
    totals_ptr += (run * chunks + here.chunk) * K
    if KIND == TOKEN:
        g_ptr += row

    state = entering_state(entering_ptr, here, H_v, segments, column, K, V, BV, BK, WHOLE)
    for c in range(count):
        start = first + c * C
        q = load_chunk(q_view, start, 0, last, H * K, K, C, BK, DESCRIPTORS)
        keys = load_chunk(storing, start, 0, last, H * K, K, C, BK, DESCRIPTORS)
        reads = keys
        if KIND == CHANNEL or ERASES:
            reads = load_chunk(reading, start, 0, last, H * K, K, C, BK, DESCRIPTORS)
        v = load_chunk(v_view, start, column, last, H_v * V, V, C, BV, DESCRIPTORS)
        inverse = load_chunk(inverses, c * C, 0, count * C, C, C, C, C, DESCRIPTORS)
        beta = tl.load(beta_ptr + slot + c * C + tl.arange(0, C))
        prefix, suffix, total = token_sums(prefix_ptr, suffix_ptr, slot + c * C, KIND, C, EXACT)
        k_norms = lengths(k_norms_ptr, key_slot + c * C, C, NORMALIZE)
        q_t = tl.trans(q)
        if KIND == CHANNEL:
            scores_t = tl.trans(load_chunk(scores, c * C, 0, count * C, C, C, C, C, DESCRIPTORS))
            q_decay = tl.full((C,), 1.0, tl.float32)
        else:
            q_norms = lengths(q_norms_ptr, key_slot + c * C, C, NORMALIZE) * scale
            q_decay = q_norms * tl.exp2(prefix)
            pairs = between(g_ptr, H_v, prefix, start, last, KIND, C, False, EXACT) * q_norms[None, :]
            if NORMALIZE:
                pairs *= k_norms[:, None]
            scores_t = (tl.dot(keys, q_t, input_precision=PRECISION) * pairs).to(dtype)
        u = written(
            state, tl.trans(reads), tl.trans(v).to(tl.float32), beta, k_norms * tl.exp2(prefix), inverse, PRECISION
        )
        read = tl.dot(state.to(dtype), q_t, input_precision=PRECISION) * q_decay[None, :]
        out = tl.dot(u.to(dtype), scores_t, read, input_precision=PRECISION)
        decay = state_decay(totals_ptr, c, total, K, BK, KIND)
        state = after_chunk(state, u, keys, k_norms * tl.exp2(suffix), decay, PRECISION)
        store_chunk(o_view, tl.trans(out).to(o_ptr.dtype.element_ty), start, column, last, H_v * V, V, C, BV, STORES)
        store_chunk(u_view, tl.trans(u).to(dtype), start, column, last, H_v * V, V, C, BV, STORES)
    if here.ends:
        leaving, mask = state_tile(state_out_ptr + here.border * K * V, column, 0, V, K, 1, V, BV, BK)
        tl.store(leaving, state, mask=mask)
