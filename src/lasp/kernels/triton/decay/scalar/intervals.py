"""Legs: so many chunks of a segment, at whose borders a decay's gradient is known from <S, D> (`gate_gradient`).

S, the state, and D, its gradient, come by there in sweeps of two directions: that of dq leaves S, that of dk leaves D.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import state_tile

# Chunks. Rounding gathers between two borders: shorter legs gather less, but at a border a sweep starts anew, and
# states are written and read. Exactness is worth that to fp32 inputs.
LEG = tl.constexpr(32)
EXACT_LEG = tl.constexpr(4)


def leg_chunks(exact: bool) -> int:
    return (EXACT_LEG if exact else LEG).value


@triton.jit
def legs_in(chunks, EXACT: tl.constexpr):
    """Legs of a segment of so many chunks."""
    return tl.cdiv(chunks, EXACT_LEG if EXACT else LEG)


@triton.jit
def next_leg(turn, chunks, REVERSE: tl.constexpr, EXACT: tl.constexpr):
    """The leg that a sweep walks next: its first chunk and the one after its last."""
    leg = legs_in(chunks, EXACT) - 1 - turn if REVERSE else turn
    length = EXACT_LEG if EXACT else LEG
    return leg * length, tl.minimum((leg + 1) * length, chunks)


@triton.jit
def inner_borders(ptr, run, chunks, chunk, size, EXACT: tl.constexpr):
    """Where the states, of `size` elements, at the ends of a segment's legs are, but for the last: the n-th at n size.

    ptr: [runs, legs, K, V], a place for every leg's length of the chunks of all segments. Inner borders are so far
    apart, also of short segments.
    """
    return ptr + (run * legs_in(chunks, EXACT) + chunk // (EXACT_LEG if EXACT else LEG)) * size


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
def leave(
    inner_ptr, border, chunks, state, k_first, K, V,
    BK: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stores a state where it is, after so many of the segment's chunks, if that is at an inner border."""
    if (border > 0) & (border < chunks):
        pointers, mask = key_tile(
            inner_ptr + border // (EXACT_LEG if EXACT else LEG) * K * V, k_first, K, V, BK, BV, ROWS
        )
        tl.store(pointers, state, mask=mask)


@triton.jit
def as_swept(state, ROUND: tl.constexpr):
    """A state as the sweeps round it, in fp32: so that in <S, D> what the last tokens add to S cancels.

    ROUND: whether they take it in bf16.
    """
    return state.to(tl.bfloat16).to(tl.float32) if ROUND else state
