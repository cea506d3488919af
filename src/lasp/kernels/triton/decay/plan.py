"""Launch configurations, by rule: no search, so that the first result comes seconds after the first call."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.triton.common import decays
from lasp.kernels.triton.common.packing import DESCRIPTOR_CHUNKS, Tables

NONE, HEAD, TOKEN, CHANNEL = decays.NONE.value, decays.HEAD.value, decays.TOKEN.value, decays.CHANNEL.value
KINDS = {0: NONE, 1: HEAD, 3: TOKEN, 4: CHANNEL}  # of decay, by the dims of g
CHUNK = 64
CHUNK_SMALL = 32
CHUNK_SMALLEST = 16
SHARED_FOR_THREE_STAGES, SHARED_FOR_TWO_STAGES = 220_000, 150_000
# Costs in units of one chunk of one sweep: what a program spends before its first chunk, and what one segment's
# state (written, scanned and read back) adds to the whole device's traffic.
START_COST = 1.5
STATE_COST = 0.017
# Likewise of the two launches that make summaries and scan them.
SUMMARIES_COST = 8.0
# Chunks: the gradients of gates per channel gather rounding over a segment (channel_inter_chunk), however long the run.
LONGEST_CHANNELS = 32
LONGEST_EXACT_CHANNELS = 4  # as `INTERVALS`
# Up to here sweeps that gather states were faster than summaries on an H100 (docs/design/kernels.md): chunks of a
# run, and of what a program gathers. Sums of gates per token are loaded when wanted: half as much again a chunk.
LONGEST_GATHERED = 32
MOST_GATHERED = {NONE: 24, HEAD: 24, TOKEN: 7}


class Tiles(NamedTuple):
    """A kernel's launch: columns of its output (or state) per program, warps per program, stages of its pipeline."""

    columns: int
    warps: int
    stages: int


class Gathered(NamedTuple):
    """The cut of a run whose sweeps gather states: chunks per segment, and whether every program has a processor."""

    segment_chunks: int
    alone: bool


class LaunchPlan(NamedTuple):
    """Cut and tiles of the launches for runs of one shape.

    Attributes:
        chunk: tokens per chunk.
        segment_chunks: chunks that one program walks.
        segments: of one head.
        chunks: of one head.
        summary: of the summaries.
        keys: of the sweeps whose output has K columns (dq, dk).
        scalar_keys: of the same where the decay's gradient is wanted too.
        rows: whether those are in rows (`sweep_rows`).
        values: of those whose output has V columns (o, dv).
        channels: for a gate per channel, of the summaries, which divide the channels among programs.
        prepared_channels: of the same from operands that have their decays.
        channel_prepare: of what is prepared per chunk.
        channel_inter_chunk: of the sweeps that read from states for dq and dk.
        channel_intra_chunk: of the kernel that completes dq, dk and dg.
        channel_values: for a gate per channel, of those that divide V.
        exact: whether decays between tokens are summed pair by pair (fp32).
        gathers: whether sweeps gather the states that enter segments themselves (`sweep`), without summaries, or have
            none to gather, since runs are single segments that start from zero; of gates per channel only the latter.
        descriptors: whether chunks are moved by tensor descriptors.
        precision: of products of fp32 operands.
        tables: where packed documents lie (`packing.Tables`), or None.
    """

    chunk: int
    segment_chunks: int
    segments: int
    chunks: int
    summary: Tiles
    keys: Tiles
    scalar_keys: Tiles
    rows: bool
    values: Tiles
    channels: Tiles
    prepared_channels: Tiles
    channel_prepare: Tiles
    channel_inter_chunk: Tiles
    channel_intra_chunk: Tiles
    channel_values: Tiles
    exact: bool
    gathers: bool
    descriptors: bool
    precision: str
    tables: Tables | None = None

    @property
    def packed(self) -> bool:
        return self.tables is not None

    @property
    def whole(self) -> bool:
        """True if every run is a single segment."""
        return bool(self.segments == 1 if self.tables is None else self.tables.whole)

    def num_gates(self, weighs: bool) -> int:
        """Sums that a gate per token leaves for the sweeps: prefixes and, where `exact`, suffixes; or prefixes less
        weights, where tokens have some."""
        return 2 if self.exact or weighs else 1


def kind_of(g: Tensor | None) -> int:
    """The kind of decay, as in `decays`."""
    return KINDS[0 if g is None else g.dim()]


def keeps_states(p: LaunchPlan, with_decay: bool) -> bool:
    """True if the states entering segments are kept for the backward pass.

    Where sweeps gather, only where a decay's gradient is wanted: the sweep of dq is slow enough then. Where runs are
    single segments there is nothing to keep.
    """
    return not p.gathers or (with_decay and not p.whole)


def tile(dim: int, dtype: torch.dtype) -> int:
    """The power of two that holds `dim` columns.

    Never below 64 for 16-bit inputs: Hopper's matrix units work on 64 rows, and with tiles of 32 columns some of these
    kernels gave wrong results there (see docs/design/kernels.md).
    """
    return max(16 if dtype == torch.float32 else 64, 1 << (dim - 1).bit_length())


def narrow(dim: int, dtype: torch.dtype) -> int:
    """Columns of a program that has few of `dim`."""
    return min(32 if dtype == torch.float32 else 64, tile(dim, dtype))


def segment_chunks(chunks: int, heads: int, processors: int, summaries: float = 0.0, scan: float = 0.0) -> int:
    """Chunks per segment that make `heads` runs of `chunks` chunks fastest on a device.

    Few long segments save state traffic, many short ones fill the processors: programs run in waves, one or two
    per processor, and the last wave should be full.

    summaries: what those and a scan over them cost, where a single segment does without. scan: what it costs for each
    segment, as far as that is not small.
    """

    def cost(length: int) -> float:
        programs = heads * -(-chunks // length)
        waves = -(-programs // processors)
        scanned = summaries + scan * -(-chunks // length) if length < chunks else 0.0
        return waves * (length + START_COST) + STATE_COST * programs + scanned

    # Every number of segments up to a few waves' worth; more only adds states.
    most = max(1, min(chunks, 8 * processors // heads + 1))
    lengths = {-(-chunks // segments) for segments in range(1, most + 1)}
    return min(lengths, key=lambda length: (cost(length), length))


def gathered(chunks: int, heads: int, slices: int, kind: int, processors: int) -> Gathered | None:
    """The cut where sweeps gather the states of segments themselves; None where summaries are cheaper.

    slices: programs that share a segment.
    """
    if chunks > LONGEST_GATHERED:
        return None
    # The shortest segments that have a processor for each program.
    most = max(1, processors // (heads * slices))
    length = -(-chunks // most)
    if chunks - length > MOST_GATHERED[kind]:
        return None
    return Gathered(length, heads * slices * -(-chunks // length) <= processors)


def _sweep_tiles(columns: int, contracted: int, dtype: torch.dtype, hopper: bool, cut: Gathered | None = None) -> Tiles:
    """Tiles of the sweeps that yield outputs of `columns` columns and contract `contracted`."""
    # Where not on Hopper, half the state a program, and half of that a warp: Blackwell's tensor memory and others'
    # registers have no room for more.
    large = contracted > 128 and not hopper
    if dtype == torch.float32:
        # No matrix unit takes these products, and a thread holds what it contracts. Where that is more than registers
        # hold (32 columns of 256 contracted, and of 128), ptxas 12.8 and 13.0 gave up on them: all but 32 on the stack,
        # and a sweep that was wrong.
        return Tiles(16, 8, 1) if contracted > 64 else Tiles(narrow(columns, dtype), 4, 1)
    if dtype == torch.float16:
        return Tiles(64, 8 if large else 4, 1)
    if large:
        return Tiles(64, 8, 2)
    if contracted > 128:
        return Tiles(128, 8, 2) if columns > 64 else Tiles(64, 4, 2)
    if cut is not None:
        # Short runs leave processors idle: twice the programs, of which a processor without one to itself has two.
        return Tiles(64, 4, 3 if cut.alone else 2)
    if columns <= 64:
        # A third stage of 128 contracted would leave a processor room for one program; two hide each other's waits.
        return Tiles(64, 4, 3 if contracted <= 64 else 2)
    # 128 rows of transposed outputs and states: two warpgroups share every product evenly.
    return Tiles(128, 8, 3)


def _scalar_tiles(columns: int, contracted: int, dtype: torch.dtype, hopper: bool) -> Tiles:
    """Tiles of the sweeps of dq and dk that yield decay gradients too."""
    if dtype != torch.bfloat16 or contracted > 128:
        return _sweep_tiles(columns, contracted, dtype, hopper)
    return Tiles(64, 4, 3 if contracted <= 64 else 2)


def _row_tiles(K: int, V: int, dtype: torch.dtype) -> Tiles | None:
    """Tiles of the sweeps in rows; None where there is none for such heads."""
    if dtype != torch.bfloat16:
        return None
    widest = max(tile(K, dtype), tile(V, dtype))
    # Twice the programs of the other sweeps, and two a processor: one works while the other waits. A stage holds 64
    # columns of K and all of V.
    return Tiles(64, 8 if widest > 128 else 4, 3 if tile(V, dtype) <= 64 and widest <= 128 else 2)


def _summary_tiles(K: int, V: int, dtype: torch.dtype) -> Tiles:
    if dtype == torch.float32 or V <= 64:
        return Tiles(narrow(V, dtype), 4, 3)
    return Tiles(128, 8 if K > 128 else 4, 3)


@functools.lru_cache(maxsize=256)
def plan(
    tokens: int,
    heads: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    kind: int,
    processors: int,
    shared_bytes: int,
    hopper: bool,
    from_zero: bool = False,
) -> LaunchPlan:
    """The plan for `heads` (batch times value heads) runs of `tokens` tokens.

    Args:
        dtype: bf16, fp16 or fp32, of q, k, v.
        kind: of decay, as in `decays`.
        processors: multiprocessors of the device.
        shared_bytes: shared memory that a program may have there.
        hopper: whether it is of NVIDIA's Hopper generation.
        from_zero: whether the whole sequence is here and starts from no state.
    """
    exact = dtype == torch.float32
    # Gates per channel are fp32 tiles of K columns: with wide heads only short chunks fit shared memory.
    chunk = CHUNK_SMALL if exact or (kind == CHANNEL and max(K, V) > 128) else CHUNK
    if exact and kind == CHANNEL and max(K, V) > 128:
        chunk = CHUNK_SMALLEST  # see `_sweep_tiles`
    chunks = max(1, -(-tokens // chunk))
    # Programs of gates per channel wait more often, and of those of narrow values a processor has two: shorter segments
    # for more of them.
    twice = kind == CHANNEL or (V <= 64 and dtype == torch.bfloat16)
    summaries = SUMMARIES_COST if kind == CHANNEL and from_zero else 0.0
    length = segment_chunks(chunks, heads, 2 * processors if twice else processors, summaries)
    if kind == CHANNEL:
        length = min(length, LONGEST_EXACT_CHANNELS if exact else LONGEST_CHANNELS)
    cut = None
    if from_zero and kind != CHANNEL:
        slices = -(-V // _sweep_tiles(V, K, dtype, hopper, Gathered(1, alone=True)).columns)
        cut = gathered(chunks, heads, slices, kind, processors)
        length = length if cut is None else cut.segment_chunks
    # Of runs that are single segments there is nothing to gather; sweeps of long ones are those of longer runs.
    single = length >= chunks and (cut is not None or (kind == CHANNEL and from_zero))
    if cut is not None and single and length > MOST_GATHERED[kind]:
        cut = None
    # The copy engine wants rows of a multiple of 16 bytes.
    aligned = K * dtype.itemsize % 16 == 0 and V * dtype.itemsize % 16 == 0
    wide = V > 64 and K <= 128 and not exact
    stages = 1 if exact else 3
    # Every configuration of three stages fits 227 KB; devices with less take fewer. They are older ones, or of other
    # makers, whose matrix units hold operands in registers too: eight warps share those.
    most = 3 if shared_bytes >= SHARED_FOR_THREE_STAGES else 2 if shared_bytes >= SHARED_FOR_TWO_STAGES else 1
    if most < 3 and max(K, V) > 128 and kind != CHANNEL:
        most = 1
    # fp16 reads states as fp32, of which 64 KB hold 32 columns of wide heads.
    few_values = 32 if most == 1 and dtype == torch.float16 and K > 128 else narrow(V, dtype)

    row_tiles = _row_tiles(K, V, dtype) if most == 3 and (cut is None or single) else None

    def fitting(tiles: Tiles) -> Tiles:
        return tiles if most == 3 else tiles._replace(warps=8, stages=min(tiles.stages, most))

    return LaunchPlan(
        chunk=chunk,
        segment_chunks=length,
        segments=-(-chunks // length),
        chunks=chunks,
        summary=fitting(_summary_tiles(K, V, dtype)),
        keys=fitting(_sweep_tiles(K, V, dtype, hopper, cut)),
        scalar_keys=row_tiles or fitting(_scalar_tiles(K, V, dtype, hopper)),
        rows=row_tiles is not None,
        values=fitting(_sweep_tiles(V, K, dtype, hopper, cut)),
        channels=fitting(Tiles(narrow(K, dtype), 4, stages)),
        prepared_channels=fitting(Tiles(128 if wide else narrow(K, dtype), 4, stages)),
        channel_prepare=fitting(Tiles(narrow(K, dtype), 4, min(stages, 2))),
        channel_inter_chunk=fitting(_sweep_tiles(K, V, dtype, hopper)),
        channel_intra_chunk=fitting(Tiles(narrow(K, dtype), 4, 1)),
        channel_values=fitting(_sweep_tiles(V, K, dtype, hopper) if most == 3 else Tiles(few_values, 4, stages)),
        exact=exact,
        gathers=cut is not None or single,
        descriptors=aligned and dtype == torch.bfloat16 and length >= DESCRIPTOR_CHUNKS and cut is None,
        precision="ieee" if exact else "tf32",
    )
