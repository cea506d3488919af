# mypy: ignore-errors
"""Sweeps backward: from the last chunk of a segment to its first, with the gradient D of the state.

    dU = P^T do + 2^suffix (k D),   Y = A^T dU,   dv = beta Y
    D' = 2^total D + (scale 2^prefix q)^T do - (2^prefix k)^T dv

First from zero, for what the segment adds to D (the transition is forward's, transposed); then, D being known, for dv.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import CHANNEL, TOKEN
from lasp.kernels.triton.common.program import (
    load_chunk,
    place,
    rows_of,
    run_bounds,
    run_of,
    slots_of,
    state_tile,
    store_chunk,
    view,
)
from lasp.kernels.triton.delta.chunk import (
    between,
    chunks_reached,
    entering_state,
    lengths,
    placed_rows,
    state_decay,
    token_sums,
)


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_reverse_kernel(
    q_ptr,  # [B, T, H, K]; with scale and decays if CHANNEL
    reading_ptr,  # [B, T, H, K]: what reads the state, k unless CHANNEL or ERASES
    storing_ptr,  # likewise: what it is written at, k unless CHANNEL
    do_ptr,  # [B, T, H_v, V]
    inverse_ptr,  # [B, H_v, chunks, C, C]: A - I
    scores_ptr,  # likewise: P, if CHANNEL
    beta_ptr,  # fp32 [B, H_v, chunks C]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    g_ptr,  # fp32 [B, T, H_v] if TOKEN
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    suffix_ptr,  # likewise, and EXACT
    totals_ptr,  # fp32 [B, H_v, chunks, K] if CHANNEL
    bounds_ptr,  # fp32 [B, H_v, chunks] if TOKEN and not ERASES, unless VALUES: log2 of what passes a chunk at most
    added_ptr,  # fp32 [B, H_v, segments, K, V], written unless VALUES, but for a run's first segment unless TOTAL
    dv_ptr,  # [B, T, H_v, V], written if VALUES
    d_chunks_ptr,  # [B, H_v, chunks, ROWS, BK], written if VALUES: D^T at the end of each chunk, rounded; if PLACED
    # in dg's memory
    d_tail_ptr,  # [B or documents, H_v, ROWS, BK], written if PLACED and VALUES: likewise of each run's last chunk
    places_ptr,  # int32 [segments, 7] if PACKED
    entering_ptr,  # fp32 as added_ptr, if VALUES: D at the end of each segment; or None for zero
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
    ROWS: tl.constexpr,  # of d_chunks, V and more
    C: tl.constexpr,
    KIND: tl.constexpr,
    ERASES: tl.constexpr,  # whether tokens read with a key of their own
    EXACT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOTAL: tl.constexpr,  # whether a run's whole is wanted
    VALUES: tl.constexpr,
    WHOLE: tl.constexpr,  # whether runs are single segments, and what enters them is given for each run
    DESCRIPTORS: tl.constexpr,
    STORES: tl.constexpr,  # whether descriptors write too
    PLACED: tl.constexpr,  # whether D lies in the place of dg
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = ROWS // BV
    here = place(places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED)
    first = here.first
    last = here.last
    if (VALUES == 0) and (TOTAL == 0):
        begin, _ = run_bounds(places_ptr, T, PACKED)
        if first == begin:
            return
    dtype = storing_ptr.dtype.element_ty
    column = here.part * BV
    run = run_of(here, H_v)
    key_row, row = rows_of(here, T, H, H_v)
    key_slot, slot = slots_of(here, H, H_v, chunks, C)
    q_view = view(q_ptr + key_row * K, last, H * K, K, C, BK, DESCRIPTORS)
    reading = view(reading_ptr + key_row * K, last, H * K, K, C, BK, DESCRIPTORS)
    storing = view(storing_ptr + key_row * K, last, H * K, K, C, BK, DESCRIPTORS)
    do_view = view(do_ptr + row * V, last, H_v * V, V, C, BV, DESCRIPTORS)
    count = tl.cdiv(last - first, C)
    inverses = view(inverse_ptr + slot * C, count * C, C, C, C, C, DESCRIPTORS)
    scores = view(scores_ptr + slot * C, count * C, C, C, C, C, DESCRIPTORS)
    if VALUES:
        dv_view = view(dv_ptr + row * V, last, H_v * V, V, C, BV, STORES)
        r = column + tl.arange(0, BV)[:, None]
        if PLACED:
            d_chunks = d_chunks_ptr + row * (K * 2) + r // C * C
        else:
            d_chunks = view(d_chunks_ptr + slot // C * (ROWS * BK), count * ROWS, BK, BK, BV, BK, False)
    totals_ptr += (run * chunks + here.chunk) * K
    if KIND == TOKEN:
        g_ptr += row

    state = entering_state(entering_ptr, here, H_v, segments, column, K, V, BV, BK, WHOLE)
    if VALUES and PLACED:
        tail = d_tail_ptr + here.border * (ROWS * BK) + r * BK + tl.arange(0, BK)[None, :]
        tl.store(tail, state.to(dtype), mask=here.ends & (r >= 0))
    reached = count
    if KIND == TOKEN and not ERASES and not VALUES:
        # Of what comes later nothing is left at the segment's start.
        reached = chunks_reached(bounds_ptr, run * chunks + here.chunk, count, True)
    for step in range(reached):
        c = reached - 1 - step
        start = first + c * C
        q = load_chunk(q_view, start, 0, last, H * K, K, C, BK, DESCRIPTORS)
        keys = load_chunk(storing, start, 0, last, H * K, K, C, BK, DESCRIPTORS)
        reads = keys
        if KIND == CHANNEL or ERASES:
            reads = load_chunk(reading, start, 0, last, H * K, K, C, BK, DESCRIPTORS)
        inverse = load_chunk(inverses, c * C, 0, count * C, C, C, C, C, DESCRIPTORS)
        do_t = tl.trans(load_chunk(do_view, start, column, last, H_v * V, V, C, BV, DESCRIPTORS))
        beta = tl.load(beta_ptr + slot + c * C + tl.arange(0, C))
        prefix, suffix, total = token_sums(prefix_ptr, suffix_ptr, slot + c * C, KIND, C, EXACT)
        k_norms = lengths(k_norms_ptr, key_slot + c * C, C, NORMALIZE)
        keys_t = tl.trans(keys)
        rounded = state.to(dtype)
        if VALUES and PLACED:
            pointers, mask = placed_rows(d_chunks, start, last, H_v * (K * 2), r, BK, C, 2)
            tl.store(pointers, rounded, mask=mask)
        elif VALUES:
            store_chunk(d_chunks, rounded, c * ROWS + column, 0, count * ROWS, BK, BK, BV, BK, False)
        if KIND == CHANNEL:
            p = load_chunk(scores, c * C, 0, count * C, C, C, C, C, DESCRIPTORS)
        else:
            q_norms = lengths(q_norms_ptr, key_slot + c * C, C, NORMALIZE) * scale
            pairs = between(g_ptr, H_v, prefix, start, last, KIND, C, True, EXACT) * q_norms[:, None]
            if NORMALIZE:
                pairs *= k_norms[None, :]
            p = (tl.dot(q, keys_t, input_precision=PRECISION) * pairs).to(dtype)
        read = tl.dot(rounded, keys_t, input_precision=PRECISION) * (k_norms * tl.exp2(suffix))[None, :]
        d_u = tl.dot(do_t, p, read, input_precision=PRECISION)
        y = tl.dot(d_u.to(dtype), inverse, d_u, input_precision=PRECISION)
        d_v = (y * beta[None, :]).to(dtype)
        if VALUES:
            store_chunk(dv_view, tl.trans(d_v), start, column, last, H_v * V, V, C, BV, STORES)
        decay = state_decay(totals_ptr, c, total, K, BK, KIND)
        if KIND == CHANNEL:
            state = tl.dot(do_t, q, state * decay[None, :], input_precision=PRECISION)
            state = tl.dot((-d_v.to(tl.float32)).to(dtype), reads, state, input_precision=PRECISION)
        else:
            from_start = tl.exp2(prefix)
            # Nothing is added, but in an accumulator's layout: so `do` is read in it, and goes to its product from
            # registers.
            decayed = do_t.to(tl.float32) * (from_start * q_norms)[None, :] + (y - y)
            state = tl.dot(decayed.to(dtype), q, state * decay[None, :], input_precision=PRECISION)
            erased = (d_v.to(tl.float32) * -(from_start * k_norms)[None, :]).to(dtype)
            state = tl.dot(erased, reads, state, input_precision=PRECISION)
    if VALUES == 0:
        added, mask = state_tile(added_ptr + (run * segments + here.segment) * K * V, column, 0, V, K, 1, V, BV, BK)
        tl.store(added, state, mask=mask)
