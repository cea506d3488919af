# mypy: ignore-errors
"""A program's place among segments, chunks and documents."""

from typing import NamedTuple

import triton
import triton.language as tl

PLACE = tl.constexpr(7)  # numbers in a segment's entry in `packing.Tables`
CHUNK_PLACE = tl.constexpr(3)  # likewise of a chunk


class ProgramPlace(NamedTuple):
    """A program's place among slices of columns, heads, batches and segments.

    Attributes:
        part, head, batch, segment: its slice, value head, batch and segment.
        first, last: its first token, and the one after its last.
        chunk: its first chunk.
        border: the index of the state [B or documents, H_v] at the run's borders.
        ends: whether the segment is the run's last.
    """

    part: tl.tensor
    head: tl.tensor
    batch: tl.tensor
    segment: tl.tensor
    first: tl.tensor
    last: tl.tensor
    chunk: tl.tensor
    border: tl.tensor
    ends: tl.tensor


@triton.jit
def place(places_ptr, slices, segments, segment_chunks, T, H_v, C: tl.constexpr, PACKED: tl.constexpr):
    """A program's `ProgramPlace`.

    places_ptr: int32 [segments, 7] if PACKED, see `packing`.
    """
    part = tl.program_id(0) % slices
    head = tl.program_id(0) // slices % H_v
    batch = tl.program_id(0) // slices // H_v
    segment = tl.program_id(1)
    if PACKED:
        entry = places_ptr + segment * PLACE
        first = tl.load(entry)
        last = tl.load(entry + 1)
        chunk = tl.load(entry + 2)
        border = tl.load(entry + 3).to(tl.int64) * H_v + head
        ends = tl.load(entry + 4) != 0
    else:
        first = segment * segment_chunks * C
        last = tl.minimum(first + segment_chunks * C, T)
        chunk = segment * segment_chunks
        border = tl.cast(batch, tl.int64) * H_v + head
        ends = segment == segments - 1
    return ProgramPlace(
        part=part,
        head=head,
        batch=batch,
        segment=segment,
        first=first,
        last=last,
        chunk=chunk,
        border=border,
        ends=ends,
    )


@triton.jit
def run_of(here, H_v):
    """The run [B, H_v] of a program."""
    return tl.cast(here.batch, tl.int64) * H_v + here.head


@triton.jit
def rows_of(here, T, H, H_v):
    """First rows of a program's batch and head, in [B, T, H] and in [B, T, H_v]."""
    row = tl.cast(here.batch, tl.int64) * T
    return row * H + here.head // (H_v // H), row * H_v + here.head


@triton.jit
def run_bounds(places_ptr, T, PACKED: tl.constexpr):
    """The first token of a program's run, and the one after its last."""
    begin = 0
    end = T
    if PACKED:
        begin = tl.load(places_ptr + tl.program_id(1) * PLACE + 5)
        end = tl.load(places_ptr + tl.program_id(1) * PLACE + 6)
    return begin, end


@triton.jit
def needed_chunks(
    places_ptr, first, last, ends, C: tl.constexpr, REVERSE: tl.constexpr, TOTAL: tl.constexpr, PACKED: tl.constexpr
):
    """Number of a segment's chunks that its summary must read: none if it is the run's last (REVERSE: first) and the
    run's TOTAL is not wanted."""
    chunks = tl.cdiv(last - first, C)
    if TOTAL:
        return chunks
    else:
        begin, _ = run_bounds(places_ptr, 0, PACKED)
        return tl.where(first == begin if REVERSE else ends, 0, chunks)


@triton.jit
def chunk_rows(slices, chunks, T, H, H_v):
    """The place of a program that has a chunk, and one of `slices` of its channels: the slice; the run; the chunk among
    those of all runs; the first rows of its batch and head in [B, T, H] and [B, T, H_v]."""
    part = tl.program_id(0) % slices
    head = tl.program_id(0) // slices % H_v
    batch = tl.cast(tl.program_id(0) // slices // H_v, tl.int64)
    run = batch * H_v + head
    return part, run, run * chunks + tl.program_id(1), batch * T * H + head // (H_v // H), batch * T * H_v + head


@triton.jit
def chunk_place(places_ptr, chunk, T, C: tl.constexpr, PACKED: tl.constexpr):
    """The first token of a chunk, and the one after its last.

    places_ptr: int32 [chunks, 3] if PACKED, see `packing`.
    """
    if PACKED:
        first = tl.load(places_ptr + chunk * CHUNK_PLACE)
        last = tl.load(places_ptr + chunk * CHUNK_PLACE + 1)
    else:
        first = chunk * C
        last = tl.minimum(first + C, T)
    return first, last


@triton.jit
def begins_run(places_ptr, chunk, PACKED: tl.constexpr):
    """True if a chunk is the first of its run; places_ptr as in `chunk_place`."""
    return tl.load(places_ptr + chunk * CHUNK_PLACE + 2) != 0 if PACKED else chunk == 0
