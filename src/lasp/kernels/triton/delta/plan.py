"""Launch configurations of the delta rule, by rule: no search."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from lasp.kernels.limits import against_keys
from lasp.kernels.triton.common.packing import DESCRIPTOR_CHUNKS
from lasp.kernels.triton.decay.plan import (
    CHANNEL,
    SHARED_FOR_THREE_STAGES,
    SHARED_FOR_TWO_STAGES,
    SUMMARIES_COST,
    TOKEN,
    Tiles,
    narrow,
    segment_chunks,
    tile,
)

CHUNK = 64
OWN_COLUMNS = 128  # of values, of a program of Hopper's own sweeps
WIDE_SCAN_COST = 0.85  # of a segment of heads with more than 128 channels, as `SUMMARIES_COST`
OPERAND_CHUNKS = 32  # at most; fewer where programs would not fill the device a few times
SMALL_CHUNK = 32  # of fp32: products by vector instructions, and gates summed pair by pair


class DeltaPlan(NamedTuple):
    """Cut and tiles of the launches for runs of one shape.

    Attributes:
        chunk: tokens per chunk.
        segment_chunks: chunks that one program walks.
        segments: of one head.
        chunks: of one head.
        solve: warps of the kernel that inverts chunks.
        summary, output, reverse, states: of the sweeps that hold states of few columns.
        keys: of dq and dk.
        scan: of the scan over segments.
        scan_step: channels of its products at a time.
        channel: of the gradients of a gate per channel.
        operands: of what such gates make of chunks before any sweep. operand_chunks: that a program of it walks.
        exact: whether decays between tokens are summed pair by pair.
        descriptors: whether chunks are read by tensor descriptors.
        own: whether heads are of the size for which Hopper has sweeps of its own.
        stores: whether sweeps then also write by them.
        precision: of products of fp32 operands.
        solve_precision: of those that invert chunks, and of those that carry states over segments.
        tables: where packed documents lie (`layout.Tables`), or None.
    """

    chunk: int
    segment_chunks: int
    segments: int
    chunks: int
    solve: int
    summary: Tiles
    output: Tiles
    reverse: Tiles
    states: Tiles
    keys: Tiles
    scan: Tiles
    scan_step: int
    channel: Tiles
    operands: Tiles
    operand_chunks: int
    exact: bool
    descriptors: bool
    own: bool
    stores: bool
    precision: str
    solve_precision: str
    tables: Any = None

    @property
    def packed(self) -> bool:
        return self.tables is not None

    @property
    def whole(self) -> bool:
        """True if every run is a single segment."""
        return bool(self.segments == 1 if self.tables is None else self.tables.whole)


@functools.lru_cache(maxsize=256)
def delta_plan(
    tokens: int,
    heads: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    kind: int,
    processors: int,
    shared_bytes: int,
    hopper: bool,
) -> DeltaPlan:
    """The plan for `heads` (batch times value heads) runs of `tokens` tokens.

    Args:
        dtype: bf16, or fp32 (also for fp16 inputs), of the kernels' operands.
        kind: of decay, as in `kind_of`.
        processors: multiprocessors of the device.
        shared_bytes: shared memory that a program may have there.
        hopper: whether it is of NVIDIA's Hopper generation.

    Raises:
        ValueError: the kernels do not take such heads.
    """
    per_channel = kind == CHANNEL
    exact = dtype == torch.float32
    wide = max(K, V) > 128
    if reason := against_keys(K, per_channel, dtype, shared_bytes):
        raise ValueError(f"backend 'triton' does not take K = {K} here: {reason}; use backend='torch'")
    most = 3 if shared_bytes >= SHARED_FOR_THREE_STAGES else 2 if shared_bytes >= SHARED_FOR_TWO_STAGES else 1
    chunk = SMALL_CHUNK if exact else CHUNK
    chunks = max(1, -(-tokens // chunk))
    # Hopper's own sweeps have a processor for each program; with decays of their own, keys are two tiles.
    own = hopper and not exact and K in (128, 256) and V in (128, 256) and not (per_channel and K > 128)
    slices = V // OWN_COLUMNS if own else 1
    scan = WIDE_SCAN_COST if K > 128 else 0.0
    length = segment_chunks(chunks, heads * slices, processors, SUMMARIES_COST, scan)
    if exact:
        sweep = keys = Tiles(16, 8, 1) if wide else Tiles(32, 4, 1)
        summary = output = reverse = states = sweep
    else:
        sweep = Tiles(64, 8 if wide or most == 1 else 4, 1 if wide or most == 1 else 2)
        output = reverse = sweep
        # Loads of two stages wait for the iteration before; where three leave a processor two programs, they do not.
        summary = sweep if wide or most < 3 else sweep._replace(stages=3)
        states = summary if hopper else sweep  # Triton 3.7 does not compile that for Blackwell
        if not wide and min(K, V) > 64 and hopper:
            # All of V in a program, one on a processor: keys are read once. Where they have decays of their own they
            # are two tiles a stage; `reverse` of a gate per token has no registers for it. (For Blackwell such tiles
            # compile to a lone trap.)
            everything = Tiles(128, 8, 2 if per_channel else 3)
            output = everything
            reverse = sweep if kind == TOKEN else everything
            summary = Tiles(128, 8, 3) if per_channel else summary
        # With all channels what lies between tokens is made once; a processor then has one program.
        keys = Tiles(128, 4, 1) if most == 3 and not wide else Tiles(64, 8 if wide or most == 1 else 4, 1)
    # Then states stay in registers from segment to segment, and the next transition is on its way.
    at_once = most == 3 and not exact and K <= 128
    # The copy engine wants rows of a multiple of 16 bytes.
    aligned = K * dtype.itemsize % 16 == 0 and V * dtype.itemsize % 16 == 0
    three = "tf32x3" if most > 1 else "ieee"
    descriptors = aligned and not exact and length >= DESCRIPTOR_CHUNKS
    return DeltaPlan(
        chunk=chunk,
        segment_chunks=length,
        segments=-(-chunks // length),
        chunks=chunks,
        solve=4 if chunk < CHUNK else 1,
        summary=summary._replace(columns=min(summary.columns, tile(K + V, dtype))),
        output=output._replace(columns=min(output.columns, tile(V, dtype))),
        reverse=reverse._replace(columns=min(reverse.columns, tile(V, dtype))),
        states=states._replace(columns=min(states.columns, tile(V, dtype))),
        keys=keys._replace(columns=min(keys.columns, tile(K, dtype))),
        scan=Tiles(16, 8, 3) if at_once else Tiles(16, 4, 2 if most > 1 else 1),
        scan_step=128 if at_once else 32,
        channel=Tiles(narrow(K, dtype), 4 if most > 1 else 8, 1),
        # The next channels' loads are on their way meanwhile.
        operands=Tiles(narrow(K, dtype), 4 if most > 1 else 8, 2 if hopper and not exact else 1),
        operand_chunks=max(1, min(OPERAND_CHUNKS, -(-chunks * heads // (4 * processors)))),
        exact=exact,
        descriptors=descriptors,
        own=own and descriptors,
        stores=hopper,  # for Blackwell, loops of several stages that write so do not compile
        precision="ieee",
        solve_precision="ieee" if exact else three,
    )


__all__ = ["DeltaPlan", "Tiles", "delta_plan", "narrow", "tile"]
