"""Launch configurations of the delta rule, by rule: no search."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from lasp.kernels.triton.common.packing import DESCRIPTOR_CHUNKS
from lasp.kernels.triton.decay.plan import (
    SHARED_FOR_THREE_STAGES,
    SHARED_FOR_TWO_STAGES,
    Tiles,
    narrow,
    segment_chunks,
    tile,
)

CHUNK = 64
# Of fp32: products by vector instructions, and gates summed pair by pair. And of gates per channel of wide heads, whose
# sweeps read three tiles of keys; but on Hopper not of narrow values, whose gradients Triton 3.6 then makes wrong.
SMALL_CHUNK = 32


class DeltaPlan(NamedTuple):
    """Cut and tiles of the launches for runs of one shape.

    Attributes:
        chunk: tokens per chunk.
        segment_chunks: chunks that one program walks.
        segments: of one head.
        chunks: of one head.
        solve: warps of the kernel that inverts chunks.
        summary, values, states: of the sweeps that hold states of few columns: summaries; o, and dv; states.
        keys: of dq and dk.
        scan: of the scan over segments.
        channel: of the gradients of a gate per channel.
        operands: of what such gates make of chunks before any sweep.
        exact: whether decays between tokens are summed pair by pair.
        descriptors: whether chunks are moved by tensor descriptors.
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
    values: Tiles
    states: Tiles
    keys: Tiles
    scan: Tiles
    channel: Tiles
    operands: Tiles
    exact: bool
    descriptors: bool
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
    per_channel: bool,
    processors: int,
    shared_bytes: int,
    hopper: bool,
) -> DeltaPlan:
    """The plan for `heads` (batch times value heads) runs of `tokens` tokens.

    Args:
        dtype: bf16, or fp32 (also for fp16 inputs), of the kernels' operands.
        per_channel: whether that is the kind of decay.
        processors: multiprocessors of the device.
        shared_bytes: shared memory that a program may have there.
        hopper: whether it is of NVIDIA's Hopper generation.
    """
    exact = dtype == torch.float32
    wide = max(K, V) > 128
    most = 3 if shared_bytes >= SHARED_FOR_THREE_STAGES else 2 if shared_bytes >= SHARED_FOR_TWO_STAGES else 1
    short = exact or (per_channel and (V > 128 or (K > 128 and most < 3)))
    chunk = SMALL_CHUNK if short else CHUNK
    chunks = max(1, -(-tokens // chunk))
    length = segment_chunks(chunks, heads, processors)
    if exact:
        values = keys = Tiles(16, 8, 1) if wide else Tiles(32, 4, 1)
        summary = states = values
    else:
        values = Tiles(64, 8 if wide or most == 1 else 4, 1 if wide or most == 1 else 2)
        summary = values if wide or most < 3 else values._replace(stages=3)
        states = values
        if per_channel and not wide and min(K, V) > 64 and most == 3:
            # Keys have decays of their own: two tiles more a stage, so one program a processor, which has all of V.
            values = Tiles(128, 8, 2)
        # With all channels what lies between tokens is made once; a processor then has one program.
        keys = Tiles(128, 4, 1) if most == 3 and not wide else Tiles(64, 8 if wide or most == 1 else 4, 1)
    # The copy engine wants rows of a multiple of 16 bytes.
    aligned = K * dtype.itemsize % 16 == 0 and V * dtype.itemsize % 16 == 0
    three = "tf32x3" if most > 1 else "ieee"
    return DeltaPlan(
        chunk=chunk,
        segment_chunks=length,
        segments=-(-chunks // length),
        chunks=chunks,
        solve=4 if chunk < CHUNK else 1 if per_channel else 2,
        summary=summary._replace(columns=min(summary.columns, tile(max(K, V), dtype))),
        values=values._replace(columns=min(values.columns, tile(V, dtype))),
        states=states._replace(columns=min(states.columns, tile(V, dtype))),
        keys=keys._replace(columns=min(keys.columns, tile(K, dtype))),
        scan=Tiles(16, 4, 2 if most > 1 else 1),
        channel=Tiles(narrow(K, dtype), 4 if most > 1 else 8, 1),
        operands=Tiles(narrow(K, dtype), 4 if most > 1 else 8, 1),
        exact=exact,
        descriptors=aligned and not exact and length >= DESCRIPTOR_CHUNKS,
        precision="ieee",
        solve_precision="ieee" if exact else three,
    )


__all__ = ["DeltaPlan", "Tiles", "delta_plan", "narrow", "tile"]
