"""Loads, stores and matrix products of tiles.

C: rows of a chunk; N: columns that exist; BN: columns of the tile, a power of two >= 16.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, row_stride, length, columns, C: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr):
    """[C, BN] rows at ptr; zero in rows >= length and, unless WHOLE, in columns >= `columns`."""
    rows = tl.arange(0, C)
    cols = tl.arange(0, BN)
    mask = rows[:, None] < length
    if not WHOLE:
        mask = mask & (cols[None, :] < columns)
    return tl.load(ptr + rows[:, None] * row_stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    ptr, row_stride, tile, length, columns, C: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr
):
    """Writes the rows < length and, unless WHOLE, the columns < `columns` of a [C, BN] tile."""
    rows = tl.arange(0, C)
    cols = tl.arange(0, BN)
    mask = rows[:, None] < length
    if not WHOLE:
        mask = mask & (cols[None, :] < columns)
    tl.store(ptr + rows[:, None] * row_stride + cols[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def state_tile(ptr, k_first, v_first, K, V, BK: tl.constexpr, BV: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointers and mask of a tile of a contiguous [K, V] state: [BK, BV], or its transpose [BV, BK].

    The transpose is formed by addressing, never from an accumulator (a compiler trap, see docs/kernels.md).
    """
    if TRANSPOSED:
        k = k_first + tl.arange(0, BK)[None, :]
        v = v_first + tl.arange(0, BV)[:, None]
    else:
        k = k_first + tl.arange(0, BK)[:, None]
        v = v_first + tl.arange(0, BV)[None, :]
    return ptr + k * V + v, (k < K) & (v < V)


@triton.jit
def state_product(rows, state, PRECISION: tl.constexpr):
    """rows @ state for an fp32 state: bf16 rows in bf16; others as fp32, since a state may exceed fp16's range."""
    if rows.dtype == tl.bfloat16:
        return tl.dot(rows, state.to(tl.bfloat16))
    else:
        return tl.dot(rows.to(tl.float32), state, input_precision=PRECISION)
