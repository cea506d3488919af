# mypy: ignore-errors
"""Products over V for the gradients of a chunk, whatever the gate.

Where V fits they take tiles that were loaded once, else they load pieces of BV columns. Transposes are products of
their own: see docs/design/kernels.md on transposed accumulators.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import load_chunk


@triton.jit
def token_tile(source, start, last, row, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """[C, BV] of do, u or dv, a view of [T, V]; nothing if V does not fit."""
    if V <= BV:
        return load_chunk(source, start, 0, last, row, V, C, BV, DESCRIPTORS)
    else:
        return 0


@triton.jit
def state_tile_of(
    source, first, rows, column, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[BV, BK] of a chunk's S^T or D^T, which begins at row `first` of a view of [rows, COLUMNS]; or nothing."""
    if V <= BV:
        return load_chunk(source, first, column, rows, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS)
    else:
        return 0


@triton.jit
def between_tokens(
    a, b, a_view, b_view, start, last, row, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T, [C, C]."""
    if V <= BV:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        product = tl.zeros((C, C), tl.float32)
        for v in range(0, V, BV):
            left = load_chunk(a_view, start, v, last, row, V, C, BV, DESCRIPTORS)
            right = load_chunk(b_view, start, v, last, row, V, C, BV, DESCRIPTORS)
            product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
        return product


@triton.jit
def from_state(
    a, state, a_view, state_view, start, last, row, first, rows, column, V: tl.constexpr, BV: tl.constexpr,
    BK: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a S^T, [C, BK]."""
    if V <= BV:
        return tl.dot(a, state, input_precision=PRECISION)
    else:
        product = tl.zeros((C, BK), tl.float32)
        for v in range(0, V, BV):
            left = load_chunk(a_view, start, v, last, row, V, C, BV, DESCRIPTORS)
            right = load_chunk(state_view, first + v, column, rows, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS)
            product = tl.dot(left, right, product, input_precision=PRECISION)
        return product


@triton.jit
def store_d_beta(d_beta_ptr, beta_ptr, m, start, last, H_v, C: tl.constexpr):
    """Store d_beta, found from dv u^T: u is beta times what was missing, dv beta times its gradient."""
    t = tl.arange(0, C)
    beta = tl.load(beta_ptr + t)
    d_beta = tl.sum(tl.where(t[:, None] == t[None, :], m, 0.0), 1) / beta / beta
    tl.store(d_beta_ptr + tl.cast(start + t, tl.int64) * H_v, d_beta, mask=start + t < last)
