# mypy: ignore-errors
"""Shared by the sweeps of dq and dk: the choice of loop, and the place of what the decay's gradient takes."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import head_rate
from lasp.kernels.triton.common.program import run_of
from lasp.kernels.triton.decay.intervals import first_interval, interval_of
from lasp.kernels.triton.decay.scalar.operands import GateTerms
from lasp.kernels.triton.decay.scalar.sweep import PART_ROWS, sweep
from lasp.kernels.triton.decay.scalar.sweep_row_major import sweep_rows


@triton.jit
def terms_of(
    x_ptr,
    sums_ptr,
    inner_ptr,
    skipped_ptr,
    decay,
    here,
    B,
    H_v,
    segments,
    chunks,
    sizes: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
):
    """The `GateTerms` of a program, of sums [parts, 2, B, H_v, chunks C], inner states
    [B, H_v, chunks / SHORTEST + segments, 2, slices, BA BC], skipped [B, H_v, segments]; x_ptr at the head's rows."""
    C: tl.constexpr = sizes.C
    run = run_of(here, H_v)
    row = tl.cast(B, tl.int64) * H_v * chunks
    parts: tl.constexpr = 1 if ROWS else sizes.BC // PART_ROWS
    size = tl.cast((sizes.N + sizes.BC - 1) // sizes.BC * sizes.BA * sizes.BC, tl.int64)
    first_inner = first_interval(run, here.segment, here.chunk, segments, chunks, SHORTEST)
    first_inner = 2 * first_inner + (1 if REVERSE else 0)
    rate = head_rate(decay.g_ptr, KIND)
    of_segment = tl.cdiv(here.last - here.first, C)
    return GateTerms(
        x_ptr=x_ptr,
        sums_ptr=sums_ptr + here.part * parts * 2 * row * C + run * chunks * C,
        sums_row=row * C,
        inner_ptr=inner_ptr + first_inner * size + here.part * (sizes.BA * sizes.BC),
        inner_row=2 * size,
        skipped_ptr=skipped_ptr + run * segments + here.segment,
        interval=interval_of(decay.prefix_ptr + here.chunk * C, rate, of_segment, C, KIND, SHORTEST, LONGEST),
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
    SHORTEST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    """Sweep the keys, in rows or in columns: see `sweep`."""
    if ROWS:
        return sweep_rows(
            operands, decay, terms, state, span, sizes,
            KIND=KIND, REVERSE=REVERSE, SHORTEST=SHORTEST, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION, WEIGHS=WEIGHS,
        )  # fmt: skip
    else:
        return sweep(
            operands, decay, terms if SUMS else None, state, span, sizes,
            KIND=KIND, REVERSE=REVERSE, WEIGH_B=False, EXACT=EXACT, SHORTEST=SHORTEST,
            DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION, WEIGHS=WEIGHS,
        )  # fmt: skip
