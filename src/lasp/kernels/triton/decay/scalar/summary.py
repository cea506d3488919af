# mypy: ignore-errors
"""Segment summaries: what each run of chunks adds to the state.

Forward, over k and v:           state = sum_t 2^(decay from t to the segment's end) k_t v_t^T
Backward (REVERSE), q and do:    state = sum_t scale 2^(decay from the segment's start to t) q_t do_t^T
One program walks one segment of one head, for BV columns of the state, which stays in fp32 registers.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import chunk_decays, decayed, head_gates, head_rate
from lasp.kernels.triton.common.program import load_chunk, needed_chunks, place, rows_of, run_of, state_tile, view


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def summary_kernel(
    k_ptr,  # [B, T, H, K]; q when REVERSE
    v_ptr,  # [B, T, H_v, V]; do when REVERSE
    g_ptr,  # [H_v], [B, T, H_v] or unused
    totals_ptr,  # fp32 [B, H_v, segments, K, V], written
    decays_ptr,  # fp32 [B, H_v, segments], base 2, written
    prefix_ptr,  # fp32 [B, H_v, chunks C] or unused
    suffix_ptr,  # likewise
    places_ptr,  # int32 [segments, 7] if PACKED
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
    REVERSE: tl.constexpr,
    BACKWARDS: tl.constexpr,  # whether chunks are walked from the last to the first; always if REVERSE
    WEIGH_K: tl.constexpr,  # whether k, not v, is weighted: see `add_chunk`
    TOTAL: tl.constexpr,  # whether a run's total is wanted, and so the summary of the segment that nothing here follows
    EXACT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    here = place(places_ptr, (V + BV - 1) // BV, segments, segment_chunks, T, H_v, C, PACKED)
    first = here.first
    last = here.last
    v_first = here.part * BV
    run = run_of(here, H_v)
    key_rows, value_rows = rows_of(here, T, H, H_v)

    k_view = view(k_ptr + key_rows * K, last, H * K, K, C, BK, DESCRIPTORS)
    v_view = view(v_ptr + value_rows * V, last, H_v * V, V, C, BV, DESCRIPTORS)
    g_ptr = head_gates(g_ptr, here.batch, here.head, T, H_v, KIND)
    rate = head_rate(g_ptr, KIND)
    state = tl.zeros((BK, BV), tl.float32)
    # Of many slow decays a sum in fp32 loses as much.
    decay = tl.full((), 0.0, tl.float64)
    slot = run * chunks * C + here.chunk * C - first
    steps = needed_chunks(places_ptr, first, last, here.ends, C, REVERSE, TOTAL, PACKED)
    for step in range(steps):
        start = first + (steps - 1 - step if BACKWARDS else step) * C
        length = tl.minimum(last - start, C)
        k = load_chunk(k_view, start, 0, last, H * K, K, C, BK, DESCRIPTORS)
        v = load_chunk(v_view, start, v_first, last, H_v * V, V, C, BV, DESCRIPTORS)
        _prefix, _added, total, _read, weight = chunk_decays(
            prefix_ptr, suffix_ptr, slot + start, rate, length, scale, KIND, C, REVERSE, EXACT, WEIGHS
        )
        if BACKWARDS and not REVERSE:
            weight *= tl.exp2(decay.to(tl.float32))
        if WEIGH_K:
            k = (k * weight[:, None]).to(k.dtype)
        else:
            v = (v * weight[:, None]).to(v.dtype)
        if REVERSE or not BACKWARDS:
            state = decayed(state, total, EXACT)
        state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
        decay += total

    out = run * segments + here.segment
    pointers, mask = state_tile(totals_ptr + out * K * V, 0, v_first, K, V, V, 1, BK, BV)
    tl.store(pointers, state, mask=mask)
    if v_first == 0:
        tl.store(decays_ptr + out, decay.to(tl.float32))
