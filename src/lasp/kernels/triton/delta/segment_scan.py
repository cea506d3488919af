# mypy: ignore-errors
"""The scan over a rank's segments: the state that enters each, and what leaves the last.

S' = M S + added;  of gradients, from the last segment to the first, D' = M^T D + added

Where an exchange wants the run's transition too, other programs of the same launch take the identity's columns through
the same products.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import state_tile


@triton.jit(do_not_specialize=["H_v", "segments"])
def delta_scan_kernel(
    added_ptr,  # fp32 [B, H_v, segments, K, V]
    moves_ptr,  # fp32 [B, H_v, segments, K, K]
    entering_ptr,  # fp32 [B, H_v, segments, K, V], written
    leaving_ptr,  # fp32 [B or documents, H_v, K, V], written if LEAVES
    products_ptr,  # fp32 as moves_ptr, scratch if LEAVES: products of the transitions before each
    transition_ptr,  # fp32 [B or documents, H_v, K, K], written if LEAVES
    bounds_ptr,  # int32 [documents + 1] if PACKED: the segments of each document
    outside_ptr,  # fp32 as leaving_ptr: what enters the run; or None for zero
    H_v,
    segments,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STEP: tl.constexpr,  # channels of a product at a time
    LEAVES: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (V + BV - 1) // BV
    all_slices: tl.constexpr = slices + ((K + BV - 1) // BV if LEAVES else 0)
    place = tl.program_id(0) % all_slices
    run = (tl.program_id(0) // all_slices).to(tl.int64)
    begin = run * segments
    if PACKED:
        document = tl.load(bounds_ptr + run // H_v)
        begin = run % H_v * segments + document
        segments = tl.load(bounds_ptr + run // H_v + 1) - document
    if place < slices:
        column = place * BV
        state = tl.zeros((BK, BV), tl.float32)
        empty = 1
        if outside_ptr is not None:
            pointers, mask = state_tile(outside_ptr + run * K * V, 0, column, K, V, V, 1, BK, BV)
            state = tl.load(pointers, mask=mask, other=0.0)
            empty = 0
        leaving = leaving_ptr + run * K * V
        _walk(
            state, empty, added_ptr, moves_ptr, entering_ptr, leaving, begin, segments, column,
            K, V, BK, BV, STEP, True, LEAVES, REVERSE, PRECISION,
        )  # fmt: skip
    elif LEAVES:
        column = (place - slices) * BV
        diagonal = tl.arange(0, BK)[:, None] == (column + tl.arange(0, BV))[None, :]
        state = tl.where(diagonal, 1.0, 0.0)
        leaving = transition_ptr + run * K * K
        _walk(
            state, 0, added_ptr, moves_ptr, products_ptr, leaving, begin, segments, column,
            K, K, BK, BV, STEP, False, True, REVERSE, PRECISION,
        )  # fmt: skip


@triton.jit
def _walk(
    state,
    empty,  # nothing enters the run: the first segment's transition is not wanted
    added_ptr,
    moves_ptr,
    entering_ptr,
    leaving_ptr,
    begin,
    segments,
    column,
    K: tl.constexpr,
    W: tl.constexpr,  # columns in all
    BK: tl.constexpr,
    BW: tl.constexpr,
    STEP: tl.constexpr,
    ADDS: tl.constexpr,
    LEAVES: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write what enters each segment in some columns, and what leaves the last."""
    turns = segments if LEAVES else segments - 1
    first_at = begin + segments - 1 if REVERSE else begin
    step: tl.constexpr = -1 if REVERSE else 1
    added = _added(added_ptr, first_at, column, turns > 0, K, W, BK, BW, ADDS)
    for turn in range(turns):
        at = first_at + step * turn
        entering, mask = state_tile(entering_ptr + at * K * W, 0, column, K, W, W, 1, BK, BW)
        tl.store(entering, state, mask=mask)
        after = added
        # The next one is on its way meanwhile.
        added = _added(added_ptr, at + step, column, turn + 1 < turns, K, W, BK, BW, ADDS)
        moves = moves_ptr + at * K * K
        known = (turn > 0) | (empty == 0)
        if STEP == BK:
            move = _transition(moves, 0, known, K, BK, STEP, REVERSE)
            state = tl.dot(move, state, after, input_precision=PRECISION)
        else:
            # Products take their operands from memory: what this program has just stored.
            tl.debug_barrier()
            for first in range(0, K, STEP):
                before, within = state_tile(entering_ptr + at * K * W, first, column, K, W, W, 1, STEP, BW)
                before = tl.load(before, mask=within, other=0.0)
                move = _transition(moves, first, known, K, BK, STEP, REVERSE)
                after = tl.dot(move, before, after, input_precision=PRECISION)
            state = after
    ptr = leaving_ptr
    if not LEAVES:
        ptr = entering_ptr + (begin if REVERSE else begin + segments - 1) * K * W
    pointers, mask = state_tile(ptr, 0, column, K, W, W, 1, BK, BW)
    tl.store(pointers, state, mask=mask & (segments > 0))


@triton.jit
def _added(added_ptr, at, column, wanted, K: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr,
           ADDS: tl.constexpr):  # fmt: skip
    """[BK, BW] of what a segment adds; zeros if it is not wanted."""
    if ADDS:
        pointers, mask = state_tile(added_ptr + at * K * W, 0, column, K, W, W, 1, BK, BW)
        return tl.load(pointers, mask=mask & wanted, other=0.0)
    else:
        return tl.zeros((BK, BW), tl.float32)


@triton.jit
def _transition(moves, first, known, K: tl.constexpr, BK: tl.constexpr, STEP: tl.constexpr, REVERSE: tl.constexpr):
    """[BK, STEP] of a segment's transition, transposed if REVERSE; zeros if it is not known."""
    if REVERSE:
        rows, inside = state_tile(moves, 0, first, K, K, 1, K, BK, STEP)
    else:
        rows, inside = state_tile(moves, 0, first, K, K, K, 1, BK, STEP)
    return tl.load(rows, mask=inside & known, other=0.0)
