"""Legs: so many chunks of a segment, at whose borders <S, D> is found where a decay's gradient is wanted.

S, the state, and D, its gradient, come by there in sweeps of two directions. So the sweep of dq leaves S, and the sweep
of dk, whose programs hold the same part of a state, pairs it with its D. What for: `gate_gradient`. Border 0 is the
segment's start, border n the end of its n-th leg; at the first and the last, S is known from before.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import state_tile

# Chunks. Rounding gathers between two borders (gate_gradient): shorter legs gather less, but their states are written
# and read, 64 bytes a token and head each at K = V = 128.
LEG = tl.constexpr(16)


def legs_of(chunks: int) -> int:
    return -(-chunks // LEG.value)


def leg_tokens(chunk: int) -> int:
    """Tokens of a leg, of chunks of so many."""
    return LEG.value * chunk


@triton.jit
def borders_of(chunks):
    """Of a segment of so many chunks."""
    return tl.cdiv(chunks, LEG) + 1


@triton.jit
def next_leg(turn, chunks, REVERSE: tl.constexpr):
    """The border that a sweep comes to; the chunks of the leg after it, first and one after the last, none after the
    last border."""
    border = tl.cdiv(chunks, LEG) - turn if REVERSE else turn
    first = (tl.maximum(border - 1, 0) if REVERSE else border) * LEG
    last = tl.minimum((border if REVERSE else border + 1) * LEG, chunks)
    return border, first, last


@triton.jit
def inner_borders(ptr, run, chunks, chunk, K, V):
    """Where the states at a segment's borders would stand, border 0 first, of [runs, cdiv(chunks, LEG), K, V], one for
    every LEG chunks of all segments: there is room for the inner ones of each, which are so far apart."""
    return ptr + (run * tl.cdiv(chunks, LEG) + chunk // LEG) * K * V


@triton.jit
def key_tile(ptr, k_first, K, V, BK: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr):
    """Pointers and mask of a state's [BK, BV] tile from k_first on, as `sweep` holds it for dq and dk; or with ROWS
    [BV, BK], as `sweep_rows` does."""
    if ROWS:
        pointers, mask = state_tile(ptr, 0, k_first, V, K, 1, V, BV, BK)
    else:
        pointers, mask = state_tile(ptr, k_first, 0, K, V, V, 1, BK, BV)
    return pointers, mask


@triton.jit
def leave(borders, border, chunks, state, k_first, K, V, BK: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr):
    """Stores S at an inner border.

    borders: where states at a segment's start, its end and, as `inner_borders` has it, within are; where <S, D> goes.
    """
    _, _, inner_ptr, _ = borders
    if (border > 0) & (border < tl.cdiv(chunks, LEG)):
        pointers, mask = key_tile(inner_ptr + border * K * V, k_first, K, V, BK, BV, ROWS)
        tl.store(pointers, state, mask=mask)


@triton.jit
def pair(
    borders,  # as in `leave`
    border,
    chunks,
    state,
    k_first,
    K,
    V,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Stores <S, D> at a border, where D is `state`."""
    start_ptr, end_ptr, inner_ptr, pairs_ptr = borders
    ptr = inner_ptr + border * K * V
    if border == 0:
        ptr = start_ptr
    if border == tl.cdiv(chunks, LEG):
        ptr = end_ptr
    pointers, mask = key_tile(ptr, k_first, K, V, BK, BV, ROWS)
    tl.store(pairs_ptr + border, tl.sum(tl.load(pointers, mask=mask, other=0.0) * as_swept(state, dtype)))


@triton.jit
def as_swept(state, dtype: tl.constexpr):
    """A state as the sweeps of inputs of `dtype` round it, in fp32: so that in <S, D> what the last tokens add to S
    cancels."""
    return state.to(tl.bfloat16).to(tl.float32) if dtype == tl.bfloat16 else state
