# mypy: ignore-errors
"""Segment summaries for a gate per channel; see `summary`."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import decayed
from lasp.kernels.triton.common.program import load_chunk, needed_chunks, place, state_tile, view
from lasp.kernels.triton.decay.channel.decays import gate_operand, load_channel_gates, prefix_sums, suffix_sums


@triton.jit(do_not_specialize=["scale", "T", "H", "H_g", "H_v", "segments", "segment_chunks", "chunks"])
def channel_summary_kernel(
    k_ptr,  # [B, T, H, K]; q when REVERSE; if PREPARED with its decays, [B, T, H_g, K], see channel_prepare
    v_ptr,  # [B, T, H_v, V]; do when REVERSE
    g_ptr,  # [B, T, H_g, K]; if PREPARED fp32 [B, H_g, chunks, K]: base-2 log-decays of chunks
    totals_ptr,  # fp32 [B, H_v, segments, K, V], written
    decays_ptr,  # fp32 [B, H_v, segments, K], base 2, written
    places_ptr,  # int32 [segments, 7] if PACKED
    scale,
    T,
    H,
    H_g,
    H_v,
    segments,
    segment_chunks,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # rows of the state a program has
    BV: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    TOTAL: tl.constexpr,  # as in `summary`
    PREPARED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    slices: tl.constexpr = (K + BK - 1) // BK
    part, head, batch, segment, first, last, chunk, _, ends = place(
        places_ptr, slices, segments, segment_chunks, T, H_v, C, PACKED
    )
    k_first = part * BK
    row = tl.cast(batch, tl.int64) * T
    k_heads = H_g if PREPARED else H
    k_head = head // (H_v // k_heads)
    g_head = head // (H_v // H_g)
    k_view = view(k_ptr + (row * k_heads + k_head) * K, last, k_heads * K, K, C, BK, DESCRIPTORS)
    v_view = view(v_ptr + (row * H_v + head) * V, last, H_v * V, V, C, BV, DESCRIPTORS)
    channel = k_first + tl.arange(0, BK)
    if PREPARED:
        run = tl.cast(batch, tl.int64) * H_g + g_head
        totals_of_chunks = g_ptr + (run * chunks + chunk - first // C) * K + channel
    else:
        g_view = view(g_ptr + (row * H_g + g_head) * K, last, H_g * K, K, C, BK, DESCRIPTORS)
    # Transposed, [BV, BK], so that a channel's decay is one column's.
    state = tl.zeros((BV, BK), tl.float32)
    decay = tl.zeros((BK,), tl.float64)
    steps = needed_chunks(places_ptr, first, last, ends, C, REVERSE, TOTAL, PACKED)
    for step in range(steps):
        start = first + (steps - 1 - step if REVERSE else step) * C
        k = load_chunk(k_view, start, k_first, last, k_heads * K, K, C, BK, DESCRIPTORS)
        v = load_chunk(v_view, start, 0, last, H_v * V, V, C, BV, DESCRIPTORS)
        if PREPARED:
            total = tl.load(totals_of_chunks + tl.cast(start // C, tl.int64) * K, mask=channel < K, other=0.0)
            weighted = k
        else:
            gates = load_channel_gates(g_view, start, last, k_first, last, H_g * K, K, C, BK, DESCRIPTORS)
            operand = gate_operand(gates, dtype)
            total = tl.sum(gates, 0)
            if REVERSE:
                weighted = (k * (tl.exp2(prefix_sums(operand, C)) * scale)).to(dtype)
            else:
                weighted = (k * tl.exp2(suffix_sums(operand, C))).to(dtype)
        state = decayed(state, total[None, :], dtype == tl.float32)
        state = tl.dot(tl.trans(v), weighted, state, input_precision=PRECISION)
        decay += total
    out = (tl.cast(batch, tl.int64) * H_v + head) * segments + segment
    pointers, mask = state_tile(totals_ptr + out * K * V, 0, k_first, V, K, 1, V, BV, BK)
    tl.store(pointers, state, mask=mask)
    tl.store(decays_ptr + out * K + channel, decay.to(tl.float32), mask=channel < K)
