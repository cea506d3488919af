# mypy: ignore-errors
"""Operands of a sweep: rows, the decay, tokens, sizes, the state that it begins with, and what it leaves."""

from typing import NamedTuple

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import head_gates
from lasp.kernels.triton.common.program import StateTile, run_of, segment_state, tile_at

# How sweeps come by the state of a segment's start, where not from summaries (then GATHER is 0):
GATHERED = tl.constexpr(1)  # from the tokens before it
ZERO = tl.constexpr(2)  # there are none before it: runs are single segments


class Operands(NamedTuple):
    """The rows of a sweep, at [B, T, heads, dim] of the batch and head, and how far apart each one's tokens are.

    Attributes:
        a: the row operand [T, A].
        b: [T, A], whose rows feed the state with c's.
        c: [T, N], whose columns are out's.
        out: [T, N], written.
    """

    a_ptr: tl.tensor
    b_ptr: tl.tensor
    c_ptr: tl.tensor
    out_ptr: tl.tensor
    a_row: tl.tensor
    b_row: tl.tensor
    c_row: tl.tensor
    out_row: tl.tensor


class Decay(NamedTuple):
    """The decay of a batch and head.

    Attributes:
        g_ptr: its gates, H_v apart, or unused.
        prefix_ptr, suffix_ptr: [chunks C] of a gate per token; suffix is unused unless EXACT or WEIGHS.
        scale: of what q reads.
    """

    g_ptr: tl.tensor
    prefix_ptr: tl.tensor
    suffix_ptr: tl.tensor
    H_v: tl.tensor
    scale: tl.tensor


class GateTerms(NamedTuple):
    """Pointers to what a sweep leaves for the decay's gradient.

    Attributes:
        x_ptr: q for the sweep of dq, k for that of dk: laid out like c.
        sums_ptr: [parts, 2, sums_row], written; at the head and the slice's first part.
        inner_ptr: tiles of states, inner_row apart, before every SHORTEST-th chunk of the segment: those before
            intervals are written.
        interval: its chunks.
        skipped_ptr: the sum of q's tokens' do . v is written there, where tokens have weights, by the first slice.
    """

    x_ptr: tl.tensor
    sums_ptr: tl.tensor
    sums_row: tl.tensor
    inner_ptr: tl.tensor
    inner_row: tl.tensor
    interval: tl.tensor
    skipped_ptr: tl.tensor


class BlockPlaces(NamedTuple):
    """Say where the states after blocks stand: the run's first one, `row` elements apart; the number of its first
    chunk that the sweep has; the run's tokens."""

    ptr: tl.tensor
    row: tl.tensor
    first: tl.tensor
    tokens: tl.tensor


class Span(NamedTuple):
    """The tokens [first, last) of a segment; `slot` of the first in [chunks C], less the token; the first column."""

    first: tl.tensor
    last: tl.tensor
    slot: tl.tensor
    column: tl.tensor


class Sizes(NamedTuple):
    """Dims of a and b, and of c and out; the powers of two that hold them, or a program's slice; tokens per chunk."""

    A: tl.constexpr
    N: tl.constexpr
    BA: tl.constexpr
    BC: tl.constexpr
    C: tl.constexpr


@triton.jit
def decay_of(g_ptr, prefix_ptr, suffix_ptr, scale, here, chunks, T, H_v, C: tl.constexpr, KIND: tl.constexpr):
    """The `Decay` of a program, of g [H_v] or [B, T, H_v] and sums [B, H_v, chunks C]."""
    padded = run_of(here, H_v) * chunks * C
    return Decay(
        g_ptr=head_gates(g_ptr, here.batch, here.head, T, H_v, KIND),
        prefix_ptr=prefix_ptr + padded,
        suffix_ptr=suffix_ptr + padded,
        H_v=H_v,
        scale=scale,
    )


@triton.jit
def span_of(here, column, C: tl.constexpr):
    return Span(first=here.first, last=here.last, slot=here.chunk * C - here.first, column=column)


@triton.jit
def value_tile(v_first, K: tl.constexpr, V: tl.constexpr):
    """The `StateTile` [BV, BK] from v_first on, as `sweep` holds it for o and dv."""
    return StateTile(r_first=v_first, s_first=0, R=V, S=K, row=1, column=V)


@triton.jit
def key_tile(k_first, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr):
    """The `StateTile` [BK, BV] from k_first on, as `sweep` holds it for dq and dk; or with ROWS [BV, BK], as
    `sweep_rows` does."""
    if ROWS:
        return StateTile(r_first=0, s_first=k_first, R=V, S=K, row=1, column=V)
    else:
        return StateTile(r_first=k_first, s_first=0, R=K, S=V, row=V, column=1)


@triton.jit
def border_state(states_ptr, decays_ptr, outside_ptr, index, border, tile, BR: tl.constexpr, BS: tl.constexpr,
                 GATHER: tl.constexpr):  # fmt: skip
    """A segment's state at its border, with what comes from beyond the run if that is not None, decayed to the segment;
    and where the state stands, with a mask. index: of the segment's state and decay; border: of the run's."""
    pointers, mask = tile_at(states_ptr + index * tile.R * tile.S, tile, BR, BS)
    state = segment_state(pointers, mask, GATHER)
    if outside_ptr is not None:
        outside, _ = tile_at(outside_ptr + border * tile.R * tile.S, tile, BR, BS)
        state += decay_to_segment(decays_ptr + index, GATHER) * tl.load(outside, mask=mask, other=0.0)
    return state, pointers, mask


@triton.jit
def decay_to_segment(decay_ptr, GATHER: tl.constexpr):
    """The decay of what enters the run on its way to a segment; `gather` applies it itself."""
    return 1.0 if GATHER else tl.exp2(tl.load(decay_ptr))
