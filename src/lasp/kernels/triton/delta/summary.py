# mypy: ignore-errors
"""Summarizes each segment: the state that it adds, and its transition, by programs of one launch.

A transition is the same recurrence on the identity's columns with v = 0: S = M there. So a state here has V + K
columns, and a program some of them.
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
    view,
)
from lasp.kernels.triton.delta.chunk import after_chunk, chunks_reached, lengths, state_decay, token_sums, written


@triton.jit(do_not_specialize=["T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_summary_kernel(
    reading_ptr,  # [B, T, H, K]: what reads the state, k unless CHANNEL or ERASES
    storing_ptr,  # likewise: what it is written at, k unless CHANNEL
    v_ptr,  # [B, T, H_v, V]
    inverse_ptr,  # [B, H_v, chunks, C, C]: A - I
    beta_ptr,  # fp32 [B, H_v, chunks C]
    norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    suffix_ptr,  # likewise, and EXACT
    totals_ptr,  # fp32 [B, H_v, chunks, K] if CHANNEL
    bounds_ptr,  # fp32 [B, H_v, chunks] if TOKEN and not ERASES: log2 of what passes a chunk at most
    added_ptr,  # fp32 [B, H_v, segments, K, V], written, but for a run's last segment unless TOTAL
    moves_ptr,  # fp32 [B, H_v, segments, K, K], written: M, but for a run's first segment unless TOTAL
    places_ptr,  # int32 [segments, 7] if PACKED
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
    TOTAL: tl.constexpr,  # whether a run's whole is wanted, or a state enters it
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (V + K + BV - 1) // BV
    here = place(places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED)
    first = here.first
    last = here.last
    begin, _ = run_bounds(places_ptr, T, PACKED)
    column = here.part * BV
    adds = (column < V) & (here.ends == 0)
    moves = (column + BV > V) & (first != begin)
    if (TOTAL == 0) & (adds == 0) & (moves == 0):
        return
    run = run_of(here, H_v)
    key_row, row = rows_of(here, T, H, H_v)
    key_slot, slot = slots_of(here, H, H_v, chunks, C)
    reading = view(reading_ptr + key_row * K, last, H * K, K, C, BK, DESCRIPTORS)
    storing = view(storing_ptr + key_row * K, last, H * K, K, C, BK, DESCRIPTORS)
    v_view = view(v_ptr + row * V, last, H_v * V, V, C, BV, DESCRIPTORS)
    count = tl.cdiv(last - first, C)
    inverses = view(inverse_ptr + slot * C, count * C, C, C, C, C, DESCRIPTORS)
    norms_ptr += key_slot
    totals_ptr += (run * chunks + here.chunk) * K

    r = column + tl.arange(0, BV)[:, None]
    d = tl.arange(0, BK)[None, :]
    begun = 0
    if KIND == TOKEN and not ERASES:
        # What is older than that leaves nothing at the segment's end, and so nothing passes through all of it.
        begun = count - chunks_reached(bounds_ptr, run * chunks + here.chunk, count, False)
        begun = tl.where((begun > 0) & (column >= V), count, begun)
    state = tl.where((r == d + V) & (begun == 0), 1.0, 0.0)
    for c in range(begun, count):
        start = first + c * C
        keys = load_chunk(storing, start, 0, last, H * K, K, C, BK, DESCRIPTORS)
        reads = keys
        if KIND == CHANNEL or ERASES:
            reads = load_chunk(reading, start, 0, last, H * K, K, C, BK, DESCRIPTORS)
        # Columns past the end read as zeros, and cost nothing.
        v = load_chunk(v_view, start, column, last, H_v * V, V, C, BV, DESCRIPTORS)
        inverse = load_chunk(inverses, c * C, 0, count * C, C, C, C, C, DESCRIPTORS)
        beta = tl.load(beta_ptr + slot + c * C + tl.arange(0, C))
        prefix, suffix, total = token_sums(prefix_ptr, suffix_ptr, slot + c * C, KIND, C, EXACT)
        norms = lengths(norms_ptr, c * C, C, NORMALIZE)
        u = written(
            state, tl.trans(reads), tl.trans(v).to(tl.float32), beta, norms * tl.exp2(prefix), inverse, PRECISION
        )
        decay = state_decay(totals_ptr, c, total, K, BK, KIND)
        state = after_chunk(state, u, keys, norms * tl.exp2(suffix), decay, PRECISION)

    at = run * segments + here.segment
    added, inside = state_tile(added_ptr + at * K * V, column, 0, V, K, 1, V, BV, BK)
    tl.store(added, state, mask=inside & (adds | (TOTAL != 0)))
    moved, inside = state_tile(moves_ptr + at * K * K, column - V, 0, K, K, 1, K, BV, BK)
    tl.store(moved, state, mask=inside & (r >= V) & (moves | (TOTAL != 0)))
