# mypy: ignore-errors
"""The gradient of q, in forward order: it needs nothing of other ranks, so it hides the backward exchange."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import rows_of, sweep_place
from lasp.kernels.triton.decay.scalar.operands import (
    GATHERED,
    Operands,
    Sizes,
    border_state,
    decay_of,
    key_tile,
    span_of,
)
from lasp.kernels.triton.decay.scalar.sweep import gather
from lasp.kernels.triton.decay.scalar.sweep_of_keys import sweep_of_keys, terms_of


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def query_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v], [B, T, H_v] or unused
    prefix_ptr,  # fp32 [B, H_v, chunks C] or unused
    suffix_ptr,  # likewise
    dq_ptr,  # [B, T, H_v, K], written
    sums_ptr,  # fp32 [parts, 2, B, H_v, chunks C], written if SUMS: q . dq, of the state and of chunks
    inner_ptr,  # bf16 or fp32 [B, H_v, chunks / SHORTEST + segments, 2, slices, BV BK], written if SUMS: `intervals`
    skipped_ptr,  # fp32 [B, H_v, segments], written if WEIGHS: sums of do . v
    states_ptr,  # fp32 [B, H_v, segments, K, V], those entering each segment; unused if GATHER
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
    BK: tl.constexpr,  # columns of dq a program has
    BV: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,  # whether by `sweep_rows`
    EXACT: tl.constexpr,
    SHORTEST: tl.constexpr,  # interval, in chunks: see `interval_of`
    LONGEST: tl.constexpr,
    GATHER: tl.constexpr,  # 0 if states are read, else as in `sweep`; with ROWS never GATHERED
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr,  # whether tokens have weights
):
    here, index, k_first = sweep_place(places_ptr, segments, segment_chunks, T, H_v, K, BK, C, PACKED)
    state, _, _ = border_state(
        states_ptr,
        None,
        None,
        index,
        here.border,
        key_tile(k_first, K, V, ROWS),
        BV if ROWS else BK,
        BK if ROWS else BV,
        GATHER,
    )
    qk, vo = rows_of(here, T, H, H_v)
    operands = Operands(
        a_ptr=do_ptr + vo * V, b_ptr=v_ptr + vo * V, c_ptr=k_ptr + qk * K, out_ptr=dq_ptr + vo * K,
        a_row=H_v * V, b_row=H_v * V, c_row=H * K, out_row=H_v * K,
    )  # fmt: skip
    sizes: tl.constexpr = Sizes(A=V, N=K, BA=BV, BC=BK, C=C)
    span = span_of(here, k_first, C)
    decay = decay_of(g_ptr, prefix_ptr, suffix_ptr, scale, here, chunks, T, H_v, C, KIND)
    terms = terms_of(
        q_ptr + qk * K, sums_ptr, inner_ptr, skipped_ptr, decay, here, B, H_v, segments, chunks, sizes,
        KIND=KIND, REVERSE=False, ROWS=ROWS, SHORTEST=SHORTEST, LONGEST=LONGEST,
    )  # fmt: skip
    tl.static_assert(not ROWS or GATHER != GATHERED)
    if GATHER == GATHERED:
        state = gather(
            operands, decay, state, span, places_ptr, T, sizes,
            KIND=KIND, REVERSE=False, WEIGH_B=False, EXACT=EXACT,
            DESCRIPTORS=DESCRIPTORS, PACKED=PACKED, PRECISION=PRECISION, WEIGHS=WEIGHS,
        )  # fmt: skip
    sweep_of_keys(
        operands, decay, terms, state, span, sizes,
        KIND=KIND, REVERSE=False, SUMS=SUMS, ROWS=ROWS, EXACT=EXACT, SHORTEST=SHORTEST,
        DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION, WEIGHS=WEIGHS,
    )  # fmt: skip
