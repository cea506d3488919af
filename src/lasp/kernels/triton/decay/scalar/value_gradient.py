# mypy: ignore-errors
"""The gradient of v, in reverse order."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import rows_of, run_of, sweep_place
from lasp.kernels.triton.decay.scalar.operands import (
    GATHERED,
    BlockPlaces,
    Operands,
    Sizes,
    border_state,
    decay_of,
    span_of,
    value_tile,
)
from lasp.kernels.triton.decay.scalar.sweep import BLOCK_CHUNKS, gather, sweep


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def value_gradient_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v], [B, T, H_v] or unused
    prefix_ptr,  # fp32 [B, H_v, chunks C] or unused
    suffix_ptr,  # likewise
    dv_ptr,  # [B, T, H_v, V], written
    d_states_ptr,  # fp32 [B, H_v, segments, K, V]: gradients of those leaving each segment, from zero; unused if GATHER
    after_ptr,  # fp32 [B, H_v, segments]: decay from each segment to the run's end; unused if GATHER
    skip_ptr,  # fp32 [H_v], if WEIGHS
    blocks_ptr,  # [B, H_v, chunks / 2, V, K], written if BLOCKS: D^T after each block of `grouped`
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # fp32 [B, H_v, K, V], or None for zero
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
    BV: tl.constexpr,  # columns of dv a program has
    C: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    GATHER: tl.constexpr,  # 0 if d_states are read, else as in `sweep`
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr,  # whether tokens have weights, and heads a skip
    BLOCKS: tl.constexpr,
):
    here, index, v_first = sweep_place(places_ptr, segments, segment_chunks, T, H_v, V, BV, C, PACKED)
    state, _, _ = border_state(
        d_states_ptr, after_ptr, d_state_out_ptr, index, here.border, value_tile(v_first, K, V), BV, BK, GATHER
    )

    qk, vo = rows_of(here, T, H, H_v)
    operands = Operands(
        a_ptr=k_ptr + qk * K, b_ptr=q_ptr + qk * K, c_ptr=do_ptr + vo * V, out_ptr=dv_ptr + vo * V,
        a_row=H * K, b_row=H * K, c_row=H_v * V, out_row=H_v * V,
    )  # fmt: skip
    span = span_of(here, v_first, C)
    decay = decay_of(g_ptr, prefix_ptr, suffix_ptr, scale, here, chunks, T, H_v, C, KIND)
    sizes: tl.constexpr = Sizes(A=K, N=V, BA=BK, BC=BV, C=C)
    skip = None
    if WEIGHS:
        skip = tl.load(skip_ptr + here.head)
    blocks = None
    if BLOCKS:
        run = run_of(here, H_v) * tl.cdiv(chunks, BLOCK_CHUNKS)
        blocks = BlockPlaces(ptr=blocks_ptr + (run * V + v_first) * K, row=V * K, first=here.chunk, tokens=T)
    if GATHER == GATHERED:
        state = gather(
            operands, decay, state, span, places_ptr, T, sizes,
            KIND=KIND, REVERSE=True, WEIGH_B=False, EXACT=EXACT,
            DESCRIPTORS=DESCRIPTORS, PACKED=PACKED, PRECISION=PRECISION, WEIGHS=WEIGHS,
        )  # fmt: skip
    sweep(
        operands, decay, None, state, span, sizes,
        KIND=KIND, REVERSE=True, WEIGH_B=False, EXACT=EXACT, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        WEIGHS=WEIGHS, skip=skip, blocks=blocks,
    )  # fmt: skip
