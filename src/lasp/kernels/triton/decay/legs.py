"""Legs: so many chunks of a segment, at whose ends <S, D> is found where a decay's gradient is wanted.

S, the state, and D, its gradient, come by there in sweeps of two directions. So the sweep of dq leaves S, and the sweep
of dk, whose programs hold the same part of a state, pairs it with its D. What for: `gate_gradient`.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import state_tile

# Chunks. Rounding gathers between two ends (gate_gradient): shorter legs gather less, but their states are read and
# written, 32 bytes a token and head at K = V = 128.
LEG = tl.constexpr(16)


def legs_of(segment_chunks: int) -> int:
    """Legs of a segment."""
    return -(-segment_chunks // LEG.value)


@triton.jit
def leg_chunks(turn, legs, chunks, SUMS: tl.constexpr, REVERSE: tl.constexpr):
    """The leg that comes next, its first chunk and the one after its last; without SUMS all chunks are one leg."""
    leg = legs - 1 - turn if REVERSE else turn
    if SUMS:
        return leg, leg * LEG, tl.minimum((leg + 1) * LEG, chunks)
    else:
        return leg, 0, chunks


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
def leave(ends_ptr, leg, state, k_first, K, V, BK: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr):
    """Stores S at the leg's end."""
    pointers, mask = key_tile(ends_ptr + leg * K * V, k_first, K, V, BK, BV, ROWS)
    tl.store(pointers, state, mask=mask)


@triton.jit
def pair(
    ends_ptr,
    carry_ptr,
    leg,
    state,
    k_first,
    K,
    V,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Stores <S, D> at the leg's end, where D is `state`."""
    pointers, mask = key_tile(ends_ptr + leg * K * V, k_first, K, V, BK, BV, ROWS)
    tl.store(carry_ptr + leg, tl.sum(tl.load(pointers, mask=mask, other=0.0) * as_swept(state, dtype)))


@triton.jit
def as_swept(state, dtype: tl.constexpr):
    """A state as the sweeps of inputs of `dtype` round it, in fp32: so that in <S, D> what the last tokens add to S
    cancels."""
    return state.to(tl.bfloat16).to(tl.float32) if dtype == tl.bfloat16 else state
