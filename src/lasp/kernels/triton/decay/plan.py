"""Launch configurations, by rule: no search, so that the first result comes seconds after the first call."""

from __future__ import annotations

import functools
from typing import NamedTuple

CHUNK = 64
CHUNK_SMALL = 32
# Costs in units of one chunk of one sweep: what a program spends before its first chunk, and what one segment's
# state (written, scanned and read back) adds to the whole device's traffic.
START_COST = 1.5
STATE_COST = 0.017


class Tiles(NamedTuple):
    """A kernel's launch: columns of its output (or state) per program, warps per program, stages of its pipeline."""

    columns: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """How a run of one shape is cut and launched.

    Attributes:
        chunk: tokens per chunk.
        segment_chunks: chunks that one program walks.
        segments: of one head.
        summary: of the summaries.
        keys: of the sweeps whose output has K columns (dq, dk).
        scalar_keys: of the same where the decay's gradient is wanted too.
        values: of those whose output has V columns (o, dv).
        channels: for a gate per channel, of the kernels that divide the channels among programs.
        channel_values: for a gate per channel, of those that divide V.
        exact: whether decays between tokens are summed pair by pair (fp32).
        descriptors: whether chunks are moved by tensor descriptors.
        precision: of products of fp32 operands.
    """

    chunk: int
    segment_chunks: int
    segments: int
    summary: Tiles
    keys: Tiles
    scalar_keys: Tiles
    values: Tiles
    channels: Tiles
    channel_values: Tiles
    exact: bool
    descriptors: bool
    precision: str


def tile(dim: int) -> int:
    """The power of two >= 16 that holds `dim` columns."""
    return max(16, 1 << (dim - 1).bit_length())


def segment_chunks(chunks: int, heads: int, processors: int) -> int:
    """Chunks per segment that make `heads` runs of `chunks` chunks fastest on a device.

    Few long segments save state traffic, many short ones fill the processors: programs run in waves, one or two
    per processor, and the last wave should be full.
    """

    def cost(length: int) -> float:
        programs = heads * -(-chunks // length)
        waves = -(-programs // processors)
        return waves * (length + START_COST) + STATE_COST * programs

    # Every number of segments up to a few waves' worth; more only adds states.
    most = max(1, min(chunks, 8 * processors // heads + 1))
    lengths = {-(-chunks // segments) for segments in range(1, most + 1)}
    return min(lengths, key=lambda length: (cost(length), length))


def _sweep_tiles(columns: int, contracted: int, dtype: str) -> Tiles:
    if dtype == "fp32":
        return Tiles(min(32, tile(columns)), 4, 1)
    if dtype == "fp16":
        return Tiles(min(64, tile(columns)), 4, 1)
    stages = 3 if contracted <= 128 else 2
    if columns > 64:
        # 128 rows of transposed outputs and states: two warpgroups share every product evenly.
        return Tiles(128, 8, stages)
    return Tiles(min(64, tile(columns)), 4, stages)


def _scalar_tiles(columns: int, contracted: int, dtype: str) -> Tiles:
    if dtype != "bf16":
        return _sweep_tiles(columns, contracted, dtype)
    return Tiles(min(64, tile(columns)), 4, 3 if contracted <= 64 else 2)


@functools.lru_cache(maxsize=256)
def plan(tokens: int, heads: int, K: int, V: int, dtype: str, per_channel: bool, processors: int) -> Plan:
    """The plan for `heads` (batch times value heads) runs of `tokens` tokens.

    Args:
        dtype: "bf16", "fp16" or "fp32", of q, k, v.
        per_channel: whether the gate is per key channel.
        processors: multiprocessors of the device.
    """
    element_bytes = 4 if dtype == "fp32" else 2
    exact = dtype == "fp32"
    # Gates per channel are fp32 tiles of K columns: with wide heads only short chunks fit shared memory.
    chunk = CHUNK_SMALL if exact or (per_channel and max(K, V) > 128) else CHUNK
    chunks = max(1, -(-tokens // chunk))
    length = segment_chunks(chunks, heads, processors)
    # The copy engine wants rows of a multiple of 16 bytes.
    aligned = (K * element_bytes) % 16 == 0 and (V * element_bytes) % 16 == 0
    wide = V > 64 and K <= 128 and not exact
    return Plan(
        chunk=chunk,
        segment_chunks=length,
        segments=-(-chunks // length),
        summary=Tiles(128 if wide else 32 if exact else min(64, tile(V)), 4, 3),
        keys=_sweep_tiles(K, V, dtype),
        scalar_keys=_scalar_tiles(K, V, dtype),
        values=_sweep_tiles(V, K, dtype),
        channels=Tiles(min(32 if exact else 64, tile(K)), 4, 1 if exact else 2),
        channel_values=Tiles(min(32 if exact else 64, tile(V)), 4, 1 if exact else 2),
        exact=exact,
        descriptors=aligned and dtype == "bf16" and tokens > 0,
        precision="ieee" if exact else "tf32",
    )
