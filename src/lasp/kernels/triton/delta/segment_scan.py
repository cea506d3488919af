# mypy: ignore-errors
"""The scan over a rank's segments: the state that enters each, and the one that leaves the last.

S' = M S + added;  of gradients, from the last segment to the first, D' = M^T D + added
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import state_tile

ZERO = tl.constexpr(0)  # what enters the run: nothing,
GIVEN = tl.constexpr(1)  # a state that is given,
IDENTITY = tl.constexpr(2)  # or the identity's columns, which leave as the run's transition


@triton.jit(do_not_specialize=["H_v", "segments"])
def delta_scan_kernel(
    added_ptr,  # fp32 [B, H_v, segments, K, V]; unused if IDENTITY
    moves_ptr,  # fp32 [B, H_v, segments, K, K]
    entering_ptr,  # fp32 [B, H_v, segments, K, V], written; scratch if IDENTITY
    leaving_ptr,  # fp32 [B or documents, H_v, K, V], written if LEAVES
    bounds_ptr,  # int32 [documents + 1] if PACKED: the segments of each document
    outside_ptr,  # fp32 as leaving_ptr: what enters the run if GIVEN
    H_v,
    segments,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STEP: tl.constexpr,  # channels of a product at a time
    START: tl.constexpr,
    LEAVES: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (V + BV - 1) // BV
    column = tl.program_id(0) % slices * BV
    run = (tl.program_id(0) // slices).to(tl.int64)
    begin = run * segments
    if PACKED:
        document = tl.load(bounds_ptr + run // H_v)
        begin = run % H_v * segments + document
        segments = tl.load(bounds_ptr + run // H_v + 1) - document
    d = tl.arange(0, BK)
    v = column + tl.arange(0, BV)
    state = tl.zeros((BK, BV), tl.float32)
    if START == GIVEN:
        pointers, mask = state_tile(outside_ptr + run * K * V, 0, column, K, V, V, 1, BK, BV)
        state = tl.load(pointers, mask=mask, other=0.0)
    if START == IDENTITY:
        state = tl.where(d[:, None] == v[None, :], 1.0, 0.0)
    # From zero, the first segment's transition is not wanted.
    empty = START == ZERO
    for turn in range(segments):
        at = begin + (segments - 1 - turn if REVERSE else turn)
        entering, mask = state_tile(entering_ptr + at * K * V, 0, column, K, V, V, 1, BK, BV)
        tl.store(entering, state, mask=mask)
        if LEAVES or turn < segments - 1:
            state = tl.zeros((BK, BV), tl.float32)
            if START != IDENTITY:
                added, _ = state_tile(added_ptr + at * K * V, 0, column, K, V, V, 1, BK, BV)
                state = tl.load(added, mask=mask, other=0.0)
            # Products take their operands from memory: what this program has just stored.
            tl.debug_barrier()
            if (turn > 0) | (empty == 0):
                moves = moves_ptr + at * K * K
                for first in range(0, K, STEP):
                    if REVERSE:
                        rows, inside = state_tile(moves, 0, first, K, K, 1, K, BK, STEP)
                    else:
                        rows, inside = state_tile(moves, 0, first, K, K, K, 1, BK, STEP)
                    move = tl.load(rows, mask=inside, other=0.0)
                    before, within = state_tile(entering_ptr + at * K * V, first, column, K, V, V, 1, STEP, BV)
                    before = tl.load(before, mask=within, other=0.0)
                    state = tl.dot(move, before, state, input_precision=PRECISION)
    if LEAVES:
        leaving, mask = state_tile(leaving_ptr + run * K * V, 0, column, K, V, V, 1, BK, BV)
        tl.store(leaving, state, mask=mask)
