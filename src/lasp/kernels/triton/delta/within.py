"""What the gradients of a chunk have of products over V, whatever the gate.

Where V fits they take tiles that were loaded once, else they load pieces of BV columns. Transposes are products of their
own: see docs/kernels.md on transposed accumulators.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_chunk
from lasp.kernels.triton.decay.channel_gates import DESCRIPTORS


@triton.jit
def token_tile(ptr, first, last, row, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr):
    """[C, BV] of do, u or dv, at [B, T, H_v, V] of the batch and head; nothing if V does not fit."""
    if V <= BV:
        return load_chunk(ptr, first, 0, last, row, V, C, BV, DESCRIPTORS)
    else:
        return 0


@triton.jit
def state_slice(ptr, column, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr):
    """[BV, BK] of a chunk's S^T or D^T, [rows, COLUMNS]; nothing if V does not fit."""
    if V <= BV:
        return load_chunk(ptr, 0, column, V, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS)
    else:
        return 0


@triton.jit
def between_tokens(
    a, b, a_ptr, b_ptr, first, last, row, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):
    """a b^T, [C, C]."""
    if V <= BV:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        product = tl.zeros((C, C), tl.float32)
        for v in range(0, V, BV):
            a = load_chunk(a_ptr, first, v, last, row, V, C, BV, DESCRIPTORS)
            b = load_chunk(b_ptr, first, v, last, row, V, C, BV, DESCRIPTORS)
            product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
        return product


@triton.jit
def from_state(
    a, state, a_ptr, state_ptr, first, last, row, column, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a S^T, [C, BK]."""
    if V <= BV:
        return tl.dot(a, state, input_precision=PRECISION)
    else:
        product = tl.zeros((C, BK), tl.float32)
        for v in range(0, V, BV):
            a = load_chunk(a_ptr, first, v, last, row, V, C, BV, DESCRIPTORS)
            state = load_chunk(state_ptr, v, column, V, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS)
            product = tl.dot(a, state, product, input_precision=PRECISION)
        return product


@triton.jit
def paired(
    s_ptr, d_ptr, column, V: tl.constexpr, STEP: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr
):
    """S * D summed over V, [BK]. Read again, few rows at a time: whole tiles would fill registers."""
    total = tl.zeros((BK,), tl.float32)
    for v in range(0, V, STEP):
        s = load_chunk(s_ptr, v, column, V, COLUMNS, COLUMNS, STEP, BK, DESCRIPTORS).to(tl.float32)
        d = load_chunk(d_ptr, v, column, V, COLUMNS, COLUMNS, STEP, BK, DESCRIPTORS).to(tl.float32)
        total += tl.sum(s * d, 0)
    return total


@triton.jit
def store_d_beta(d_beta_ptr, beta_ptr, m, first, last, H_v, C: tl.constexpr):
    """From dv u^T: u is beta times what was missing, dv beta times its gradient."""
    t = tl.arange(0, C)
    beta = tl.load(beta_ptr + t)
    d_beta = tl.sum(tl.where(t[:, None] == t[None, :], m, 0.0), 1) / beta / beta
    tl.store(d_beta_ptr + tl.cast(first + t, tl.int64) * H_v, d_beta, mask=first + t < last)
