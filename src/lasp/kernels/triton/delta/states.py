# mypy: ignore-errors
"""The states that enter a segment's chunks, made again from what its tokens wrote."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import load_chunk, place, rows_of, run_of, slots_of, store_chunk, view
from lasp.kernels.triton.delta.chunk import after_chunk, entering_state, lengths, placed_rows, state_decay, token_sums


@triton.jit(do_not_specialize=["T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_states_kernel(
    storing_ptr,  # [B, T, H, K]: k, or what it is written at if CHANNEL
    u_ptr,  # [B, T, H_v, V]
    norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    suffix_ptr,  # likewise, and EXACT
    totals_ptr,  # fp32 [B, H_v, chunks, K] if CHANNEL
    s_chunks_ptr,  # [B, H_v, chunks, ROWS, BK], written: S^T at the start of each chunk, rounded; if PLACED dq's memory
    # in that dtype, for its first rows (`within.placed_state`)
    s_rest_ptr,  # if PLACED dk's memory, for the others
    s_tail_ptr,  # [B or documents, H_v, ROWS, BK], written if PLACED: S^T at the start of each run's last chunk
    places_ptr,  # int32 [segments, 7] if PACKED
    entering_ptr,  # fp32 [B, H_v, segments, K, V], or None for zero
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
    ROWS: tl.constexpr,  # V and more
    C: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WHOLE: tl.constexpr,  # whether runs are single segments, and what enters them is given for each run
    DESCRIPTORS: tl.constexpr,
    STORES: tl.constexpr,  # whether descriptors write too
    PLACED: tl.constexpr,  # whether states lie in the place of gradients
    SPREAD: tl.constexpr,  # how many of k's elements one of dq's is long
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = ROWS // BV
    here = place(places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED)
    first = here.first
    last = here.last
    dtype = storing_ptr.dtype.element_ty
    column = here.part * BV
    run = run_of(here, H_v)
    key_row, row = rows_of(here, T, H, H_v)
    key_slot, _slot = slots_of(here, H, H_v, chunks, C)
    storing = view(storing_ptr + key_row * K, last, H * K, K, C, BK, DESCRIPTORS)
    u_view = view(u_ptr + row * V, last, H_v * V, V, C, BV, DESCRIPTORS)
    count = tl.cdiv(last - first, C)
    at = run * chunks + here.chunk
    if PLACED:
        # A program has as many values as a chunk has tokens.
        s_chunks = (s_chunks_ptr if here.part == 0 else s_rest_ptr) + row * (K * SPREAD)
        if STORES:
            s_chunks = tl.make_tensor_descriptor(
                s_chunks, [last, 2, C], [H_v * (K * SPREAD), C * SPREAD, 1], [C, 2, C]
            )  # fmt: skip
    else:
        s_chunks = view(s_chunks_ptr + at * (ROWS * BK), count * ROWS, BK, BK, BV, BK, STORES)
    norms_ptr += key_slot
    totals_ptr += at * K

    state = entering_state(entering_ptr, here, H_v, segments, column, K, V, BV, BK, WHOLE)
    for c in range(count - 1):
        start = first + c * C
        keys = load_chunk(storing, start, 0, last, H * K, K, C, BK, DESCRIPTORS)
        u_t = tl.trans(load_chunk(u_view, start, column, last, H_v * V, V, C, BV, DESCRIPTORS))
        _prefix, suffix, total = token_sums(prefix_ptr, suffix_ptr, at * C + c * C, KIND, C, EXACT)
        norms = lengths(norms_ptr, c * C, C, NORMALIZE)
        if PLACED:
            _store_placed(s_chunks, state.to(dtype), start, last, H_v * (K * SPREAD), C, SPREAD, STORES)
        else:
            store_chunk(s_chunks, state.to(dtype), c * ROWS + column, 0, count * ROWS, BK, BK, BV, BK, STORES)
        decay = state_decay(totals_ptr, c, total, K, BK, KIND)
        state = after_chunk(state, u_t, keys, norms * tl.exp2(suffix), decay, PRECISION)
    if count > 0:
        c = count - 1
        if PLACED:
            # Of a chunk that has too few tokens to hold it the rest is left out.
            _store_placed(s_chunks, state.to(dtype), first + c * C, last, H_v * (K * SPREAD), C, SPREAD, STORES)
            r = column + tl.arange(0, BV)[:, None]
            tail = s_tail_ptr + here.border * (ROWS * BK) + r * BK + tl.arange(0, BK)[None, :]
            tl.store(tail, state.to(dtype), mask=here.ends & (r >= 0))
        else:
            store_chunk(s_chunks, state.to(dtype), c * ROWS + column, 0, count * ROWS, BK, BK, BV, BK, STORES)


@triton.jit
def _store_placed(target, state, start, last, row, C: tl.constexpr, SPREAD: tl.constexpr, STORES: tl.constexpr):
    if STORES:
        target.store([start, 0, 0], tl.reshape(state, (C, 2, C)))
    else:
        r = tl.arange(0, C)[:, None]
        pointers, mask = placed_rows(target, start, last, row, r, state.shape[1], C, SPREAD)
        tl.store(pointers, state, mask=mask)
