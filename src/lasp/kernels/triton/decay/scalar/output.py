# mypy: ignore-errors
"""Outputs, and the states that enter each segment with other ranks' part applied."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import rows_of, sweep_place, tile_at
from lasp.kernels.triton.decay.scalar.operands import (
    GATHERED,
    Operands,
    Sizes,
    border_state,
    decay_of,
    span_of,
    value_tile,
)
from lasp.kernels.triton.decay.scalar.sweep import gather, sweep


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def output_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v], [B, T, H_v] or unused
    prefix_ptr,  # fp32 [B, H_v, chunks C] or unused
    suffix_ptr,  # likewise
    o_ptr,  # [B, T, H_v, V], written
    states_ptr,  # fp32 [B, H_v, segments, K, V] from zero; replaced by those from state_in; see GATHER, KEEPS
    before_ptr,  # fp32 [B, H_v, segments]: decay from the run's start to each segment; unused if GATHER
    state_out_ptr,  # fp32 [B, H_v, K, V], written
    skip_ptr,  # fp32 [H_v], if WEIGHS
    places_ptr,  # int32 [segments, 7] if PACKED
    state_in_ptr,  # fp32 [B, H_v, K, V], or None for zero; always None if GATHER
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
    EXACT: tl.constexpr,
    LEARNED: tl.constexpr,  # whether the decay's gradient is wanted, for which k is weighted: see `add_chunk`
    GATHER: tl.constexpr,  # 0 if states are read, else as in `sweep`
    KEEPS: tl.constexpr,  # whether they are written if GATHERED
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr,  # whether tokens have weights, and heads a skip
):
    here, index, v_first = sweep_place(places_ptr, segments, segment_chunks, T, H_v, V, BV, C, PACKED)
    state, entering, mask = border_state(
        states_ptr, before_ptr, state_in_ptr, index, here.border, value_tile(v_first, K, V), BV, BK, GATHER
    )
    if state_in_ptr is not None:
        # A tile smaller than the program is held by several threads: none may store before all have loaded.
        tl.debug_barrier()
        tl.store(entering, state, mask=mask)

    qk, vo = rows_of(here, T, H, H_v)
    operands = Operands(
        a_ptr=q_ptr + qk * K, b_ptr=k_ptr + qk * K, c_ptr=v_ptr + vo * V, out_ptr=o_ptr + vo * V,
        a_row=H * K, b_row=H * K, c_row=H_v * V, out_row=H_v * V,
    )  # fmt: skip
    span = span_of(here, v_first, C)
    decay = decay_of(g_ptr, prefix_ptr, suffix_ptr, scale, here, chunks, T, H_v, C, KIND)
    sizes: tl.constexpr = Sizes(A=K, N=V, BA=BK, BC=BV, C=C)
    skip = None
    if WEIGHS:
        skip = tl.load(skip_ptr + here.head)
    if GATHER == GATHERED:
        state = gather(
            operands, decay, state, span, places_ptr, T, sizes,
            KIND=KIND, REVERSE=False, WEIGH_B=LEARNED, EXACT=EXACT,
            DESCRIPTORS=DESCRIPTORS, PACKED=PACKED, PRECISION=PRECISION, WEIGHS=WEIGHS,
        )  # fmt: skip
        if KEEPS:
            tl.store(entering, state, mask=mask)
    state = sweep(
        operands, decay, None, state, span, sizes,
        KIND=KIND, REVERSE=False, WEIGH_B=LEARNED, EXACT=EXACT, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        WEIGHS=WEIGHS, skip=skip,
    )  # fmt: skip
    if here.ends:
        leaving, _ = tile_at(state_out_ptr + here.border * K * V, value_tile(v_first, K, V), BV, BK)
        tl.store(leaving, state, mask=mask)
