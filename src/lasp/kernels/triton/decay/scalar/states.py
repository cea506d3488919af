# mypy: ignore-errors
"""The states that sweeps begin with."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import StateTile, segment_state, tile_at

# How sweeps come by the state of a segment's start, where not from summaries (then GATHER is 0):
GATHERED = tl.constexpr(1)  # from the tokens before it
ZERO = tl.constexpr(2)  # there are none before it: runs are single segments


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
