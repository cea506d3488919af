# mypy: ignore-errors
"""Operands of a sweep: rows, the decay, what it leaves for the decay's gradient, tokens, sizes."""

from typing import NamedTuple

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import head_gates
from lasp.kernels.triton.common.program import run_of


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
        prefix_ptr, suffix_ptr: [chunks C] of a gate per token; suffix is unused unless EXACT.
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
        inner_ptr: states within the segment (`inner_borders`), [N, A] each, written.
    """

    x_ptr: tl.tensor
    sums_ptr: tl.tensor
    sums_row: tl.tensor
    inner_ptr: tl.tensor


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
