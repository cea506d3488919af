# mypy: ignore-errors
"""The gradients of k and v in one launch, where they are the same sweep of other operands: K = V, ungrouped heads, no
gradient of the decay.

Programs are paired: one makes dk and one dv of the same tokens. They keep pace, so that what both read, q and do, comes
from memory once and from L2 the second time.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import StateTile, place, run_of
from lasp.kernels.triton.decay.scalar.operands import GATHERED, Operands, Sizes, border_state, decay_of, span_of
from lasp.kernels.triton.decay.scalar.sweep import gather, sweep


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def key_value_gradient_kernel(
    q_ptr,  # [B, T, H, D]
    k_ptr,  # [B, T, H, D]
    v_ptr,  # [B, T, H, D]
    do_ptr,  # [B, T, H, D]
    g_ptr,  # [H], [B, T, H] or unused
    prefix_ptr,  # fp32 [B, H, chunks C] or unused
    suffix_ptr,  # likewise
    dk_ptr,  # [B, T, H, D], written
    dv_ptr,  # [B, T, H, D], written
    d_states_ptr,  # fp32 [B, H, segments, D, D]: gradients of those leaving each segment, from zero; unused if GATHER
    after_ptr,  # fp32 [B, H, segments]: decay from each segment to the run's end; unused if GATHER
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # fp32 [B, H, D, D], or None for zero
    scale,
    T,
    H,
    H_v,  # H
    segments,
    segment_chunks,
    chunks,
    K: tl.constexpr,  # D
    V: tl.constexpr,  # D
    BA: tl.constexpr,  # that holds D
    BC: tl.constexpr,  # columns of a gradient that a program has
    C: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    GATHER: tl.constexpr,  # 0 if d_states are read, else as in `sweep`
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (K + BC - 1) // BC
    here = place(places_ptr, 2 * slices, segments, segment_chunks, T, H, C, PACKED)
    of_keys = here.part % 2 == 0
    column = here.part // 2 * BC
    index = run_of(here, H) * segments + here.segment
    # The sweep holds the state with its outputs' dim first.
    row = tl.where(of_keys, V, 1)
    along = tl.where(of_keys, 1, V)
    state, _, _ = border_state(
        d_states_ptr, after_ptr, d_state_out_ptr, index, here.border,
        StateTile(r_first=column, s_first=0, R=K, S=V, row=row, column=along), BC, BA, GATHER,
    )  # fmt: skip

    at = (tl.cast(here.batch, tl.int64) * T * H + here.head) * K
    operands = Operands(
        a_ptr=tl.where(of_keys, v_ptr, k_ptr) + at,
        b_ptr=tl.where(of_keys, do_ptr, q_ptr) + at,
        c_ptr=tl.where(of_keys, q_ptr, do_ptr) + at,
        out_ptr=tl.where(of_keys, dk_ptr, dv_ptr) + at,
        a_row=H * K, b_row=H * K, c_row=H * K, out_row=H * K,
    )  # fmt: skip
    span = span_of(here, column, C)
    decay = decay_of(g_ptr, prefix_ptr, suffix_ptr, scale, here, chunks, T, H, C, KIND)
    sizes: tl.constexpr = Sizes(A=K, N=V, BA=BA, BC=BC, C=C)
    if GATHER == GATHERED:
        state = gather(
            operands, decay, state, span, places_ptr, T, sizes,
            KIND=KIND, REVERSE=True, WEIGH_B=False, EXACT=EXACT,
            DESCRIPTORS=DESCRIPTORS, PACKED=PACKED, PRECISION=PRECISION,
        )  # fmt: skip
    sweep(
        operands, decay, None, state, span, sizes,
        KIND=KIND, REVERSE=True, WEIGH_B=False, EXACT=EXACT, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
    )  # fmt: skip
