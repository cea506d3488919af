# mypy: ignore-errors
"""A program's place among segments, chunks and documents, and the tiles of rows and of states that it moves there.

A *view* of the tokens of one (batch, head), [T, N] with `row` elements from one token to the next, is read and
written in chunks of C tokens. It is a tensor descriptor where alignment allows (the copy engine then moves a chunk
without a register or an address computed per thread), else a plain pointer. Both give zeros outside [T, N] and
write nothing there. BN: columns of a tile, a power of two >= 16.
"""

from typing import NamedTuple

import triton
import triton.language as tl

PLACE = tl.constexpr(7)  # numbers in a segment's entry in `packing.Tables`
CHUNK_PLACE = tl.constexpr(4)  # likewise of a chunk
# Of kernels that have a program a chunk: it would spend longer on making descriptors than on its chunk.
DESCRIPTORS = tl.constexpr(False)


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
def sweep_place(places_ptr, segments, segment_chunks, T, H_v, N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
                PACKED: tl.constexpr):  # fmt: skip
    """The place of a program that sweeps a segment for BN of N columns; the index of its segment [B, H_v, segments] and
    its first column."""
    here = place(places_ptr, (N + BN - 1) // BN, segments, segment_chunks, T, H_v, C, PACKED)
    return here, run_of(here, H_v) * segments + here.segment, here.part * BN


@triton.jit
def rows_of(here, T, H, H_v):
    """First rows of a program's batch and head, in [B, T, H] and in [B, T, H_v]."""
    row = tl.cast(here.batch, tl.int64) * T
    return row * H + here.head // (H_v // H), row * H_v + here.head


@triton.jit
def slots_of(here, H, H_v, chunks, C: tl.constexpr):
    """First slots of a program's chunks, in [B, H, chunks C] and in [B, H_v, chunks C]."""
    key_run = tl.cast(here.batch, tl.int64) * H + here.head // (H_v // H)
    return (key_run * chunks + here.chunk) * C, (run_of(here, H_v) * chunks + here.chunk) * C


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

    places_ptr: int32 [chunks, 4] if PACKED, see `packing`.
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


@triton.jit
def border_of(places_ptr, chunk, batch, PACKED: tl.constexpr):
    """The batch or document of a chunk; places_ptr as in `chunk_place`."""
    return tl.load(places_ptr + chunk * CHUNK_PLACE + 3).to(tl.int64) if PACKED else tl.cast(batch, tl.int64)


class StateTile(NamedTuple):
    """A program's tile of a state [R, S]: from r_first and s_first on, of strides row and column.

    Its own shape goes beside it: Triton makes tensors of the constants in a tuple that is assigned, and Triton 3.6 of
    those in one that is handed on.
    """

    r_first: tl.tensor
    s_first: tl.tensor
    R: tl.constexpr
    S: tl.constexpr
    row: tl.tensor
    column: tl.tensor


@triton.jit
def view(ptr, T, row, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr):
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(ptr, [T, N], [tl.cast(row, tl.int64), 1], [C, BN])
    else:
        return ptr


@triton.jit
def _addresses(ptr, first, column, T, row, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr):
    tokens = first + tl.arange(0, C)[:, None]
    columns = column + tl.arange(0, BN)[None, :]
    pointers = ptr + tl.cast(first, tl.int64) * row + tl.arange(0, C)[:, None] * row + columns
    return pointers, (tokens < T) & (columns < N)


@triton.jit
def load_chunk(
    source, first, column, T, row, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """[C, BN]: tokens from `first` on, columns from `column` on."""
    if DESCRIPTORS:
        return source.load([first, column])
    else:
        pointers, mask = _addresses(source, first, column, T, row, N, C, BN)
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_chunk(
    target, tile, first, column, T, row, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """The inverse of `load_chunk`; tile has the view's dtype."""
    if DESCRIPTORS:
        target.store([first, column], tile)
    else:
        pointers, mask = _addresses(target, first, column, T, row, N, C, BN)
        tl.store(pointers, tile, mask=mask)


@triton.jit
def state_tile(ptr, row_first, column_first, R, S, row, column, BR: tl.constexpr, BS: tl.constexpr):
    """Pointers and mask of a [BR, BS] tile of a state [R, S] with the given strides.

    Swapped strides read the transpose: it is never formed from an accumulator (a compiler trap, see
    docs/design/kernels.md).
    """
    r = row_first + tl.arange(0, BR)[:, None]
    s = column_first + tl.arange(0, BS)[None, :]
    return ptr + r * row + s * column, (r < R) & (s < S)


@triton.jit
def tile_at(ptr, tile, BR: tl.constexpr, BS: tl.constexpr):
    """Pointers and mask of a `StateTile` [BR, BS] of the state at ptr."""
    return state_tile(ptr, tile.r_first, tile.s_first, tile.R, tile.S, tile.row, tile.column, BR, BS)


@triton.jit
def segment_state(pointers, mask, GATHER: tl.constexpr):
    """Load a segment's state before the sweep: zeros where the sweep gathers it."""
    if GATHER:
        return tl.zeros(pointers.shape, tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def as_swept(state, ROUND: tl.constexpr):
    """A state as the sweeps round it, in fp32: so that in <S, D> what the last tokens add to S cancels.

    ROUND: whether they take it in bf16.
    """
    return state.to(tl.bfloat16).to(tl.float32) if ROUND else state
