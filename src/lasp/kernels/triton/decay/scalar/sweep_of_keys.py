# mypy: ignore-errors
"""Shared by the sweeps of dq and dk: the choice of loop, and the place of what the decay's gradient takes."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import run_of
from lasp.kernels.triton.decay.scalar.operands import GateTerms, inner_borders
from lasp.kernels.triton.decay.scalar.sweep import PART_ROWS, sweep
from lasp.kernels.triton.decay.scalar.sweep_row_major import sweep_rows


@triton.jit
def terms_of(
    x_ptr, sums_ptr, inner_ptr, here, B, H_v, chunks, sizes: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr
):
    """The `GateTerms` of a program, of sums [parts, 2, B, H_v, chunks C] and inner states [B, H_v, intervals, K, V];
    x_ptr at the head's rows."""
    run = run_of(here, H_v)
    sums_row = tl.cast(B, tl.int64) * H_v * (chunks * sizes.C)
    parts: tl.constexpr = 1 if ROWS else sizes.BC // PART_ROWS
    return GateTerms(
        x_ptr=x_ptr,
        sums_ptr=sums_ptr + here.part * parts * 2 * sums_row + run * chunks * sizes.C,
        sums_row=sums_row,
        inner_ptr=inner_borders(inner_ptr, run, chunks, here.chunk, sizes.N * sizes.A, EXACT),
    )


@triton.jit
def sweep_of_keys(
    operands,
    decay,
    terms,
    state,
    span,
    sizes: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMS: tl.constexpr,  # whether `terms` are wanted
    ROWS: tl.constexpr,  # whether by `sweep_rows`
    EXACT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sweep the keys, in rows or in columns: see `sweep`."""
    if ROWS:
        return sweep_rows(
            operands, decay, terms, state, span, sizes,
            KIND=KIND, REVERSE=REVERSE, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
    else:
        return sweep(
            operands, decay, terms if SUMS else None, state, span, sizes,
            KIND=KIND, REVERSE=REVERSE, WEIGH_B=False, EXACT=EXACT, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
