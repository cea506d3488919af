# mypy: ignore-errors
"""Tiles of rows, and of states.

A *view* of the tokens of one (batch, head), [T, N] with `row` elements from one token to the next, is read and
written in chunks of C tokens. It is a tensor descriptor where alignment allows (the copy engine then moves a chunk
without a register or an address computed per thread), else a plain pointer. Both give zeros outside [T, N] and
write nothing there. BN: columns of a tile, a power of two >= 16.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Of kernels that have a program a chunk: it would spend longer on making descriptors than on its chunk.
DESCRIPTORS = tl.constexpr(False)


class StateTile(NamedTuple):
    """A program's tile of a state [R, S]: from r_first and s_first on, of strides row and column.

    Its own shape goes beside it: Triton makes tensors of the constants in a tuple that is assigned, and Triton 3.6 of
    those in one that is handed on.
    """

    r_first: tl.tensor
    s_first: tl.tensor
    R: tl.constexpr
    S: tl.constexpr
    row: tl.tensor
    column: tl.tensor


@triton.jit
def view(ptr, T, row, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr):
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(ptr, [T, N], [tl.cast(row, tl.int64), 1], [C, BN])
    else:
        return ptr


@triton.jit
def _addresses(ptr, first, column, T, row, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr):
    tokens = first + tl.arange(0, C)[:, None]
    columns = column + tl.arange(0, BN)[None, :]
    pointers = ptr + tl.cast(first, tl.int64) * row + tl.arange(0, C)[:, None] * row + columns
    return pointers, (tokens < T) & (columns < N)


@triton.jit
def load_chunk(
    source, first, column, T, row, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """[C, BN]: tokens from `first` on, columns from `column` on."""
    if DESCRIPTORS:
        return source.load([first, column])
    else:
        pointers, mask = _addresses(source, first, column, T, row, N, C, BN)
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_chunk(
    target, tile, first, column, T, row, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """The inverse of `load_chunk`; tile has the view's dtype."""
    if DESCRIPTORS:
        target.store([first, column], tile)
    else:
        pointers, mask = _addresses(target, first, column, T, row, N, C, BN)
        tl.store(pointers, tile, mask=mask)


@triton.jit
def state_tile(ptr, row_first, column_first, R, S, row, column, BR: tl.constexpr, BS: tl.constexpr):
    """Pointers and mask of a [BR, BS] tile of a state [R, S] with the given strides.

    Swapped strides read the transpose: it is never formed from an accumulator (a compiler trap, see
    docs/design/kernels.md).
    """
    r = row_first + tl.arange(0, BR)[:, None]
    s = column_first + tl.arange(0, BS)[None, :]
    return ptr + r * row + s * column, (r < R) & (s < S)


@triton.jit
def tile_at(ptr, tile, BR: tl.constexpr, BS: tl.constexpr):
    """Pointers and mask of a `StateTile` [BR, BS] of the state at ptr."""
    return state_tile(ptr, tile.r_first, tile.s_first, tile.R, tile.S, tile.row, tile.column, BR, BS)


@triton.jit
def segment_state(pointers, mask, GATHER: tl.constexpr):
    """Load a segment's state before the sweep: zeros where the sweep gathers it."""
    if GATHER:
        return tl.zeros(pointers.shape, tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def as_swept(state, ROUND: tl.constexpr):
    """A state as the sweeps round it, in fp32: so that in <S, D> what the last tokens add to S cancels.

    ROUND: whether they take it in bf16.
    """
    return state.to(tl.bfloat16).to(tl.float32) if ROUND else state
