# mypy: ignore-errors
"""Legs: so many chunks of a segment, at whose borders a decay's gradient is known from <S, D> (`gate_gradient`).

S, the state, and D, its gradient, come by there in sweeps of two directions: that of dq leaves S, that of dk leaves D.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import tile_at

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
    """Pointer to the states, of `size` elements, at the ends of a segment's legs but the last: the n-th at n size.

    ptr: [runs, legs, K, V], a place for every leg's length of the chunks of all segments. Inner borders are so far
    apart, also of short segments.
    """
    return ptr + (run * legs_in(chunks, EXACT) + chunk // (EXACT_LEG if EXACT else LEG)) * size


@triton.jit
def leave(inner_ptr, border, chunks, state, tile, EXACT: tl.constexpr):
    """Stores a state where it is, after so many of the segment's chunks, if that is at an inner border."""
    if (border > 0) & (border < chunks):
        inner_ptr += border // (EXACT_LEG if EXACT else LEG) * tile.R * tile.S
        pointers, mask = tile_at(inner_ptr, tile, state.shape[0], state.shape[1])
        tl.store(pointers, state, mask=mask)
