"""Places of packed documents among segments and chunks.

Documents are cut into chunks and segments each from its own first token, so that no chunk holds tokens of two and a
segment's state belongs to one: nothing can leak, not even a NaN. A document takes at least one segment, so very short
ones cost a state each (docs/design/kernels.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lasp.kernels.triton.common.program import CHUNK_PLACE, PLACE
from lasp.recurrence.documents import Documents

# A program makes its tensor descriptors in microseconds: fewer chunks than this do not pay for them.
DESCRIPTOR_CHUNKS = 8


class RunPlan(Protocol):
    """Fields that the plans of all families share: the cut of a run, and the places of packed documents in it."""

    @property
    def chunk(self) -> int: ...
    @property
    def segment_chunks(self) -> int: ...
    @property
    def descriptors(self) -> bool: ...
    @property
    def tables(self) -> Any: ...


class Tables(NamedTuple):
    """Tables that programs look up, int32; and what follows from them.

    Attributes:
        segments: [segments, 7]: first token, the one after the last, first chunk, document, whether it is the last of
            its document, that document's first token, the one after its last.
        chunks: [chunks, 3]: first token, the one after the last, whether it is the first of its document.
        bounds: [documents + 1]: the first segment of each document, and the number of segments.
        whole: whether no document has two segments.
    """

    segments: Tensor
    chunks: Tensor
    bounds: Tensor
    whole: bool


def _cut(starts: Tensor, ends: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of tokens in pieces of `size`: each piece's run, its first token, and the one after its last."""
    counts = (ends - starts + size - 1) // size
    run = torch.repeat_interleave(torch.arange(len(starts)), counts)
    first_piece = counts.cumsum(0) - counts
    first = starts[run] + (torch.arange(len(run)) - first_piece[run]) * size
    return run, first, torch.minimum(first + size, ends[run])


def _tables(documents: Documents, chunk: int, segment: int, device: torch.device) -> Tables:
    bounds = torch.tensor(documents.bounds, dtype=torch.int64)
    starts, ends = bounds[:-1], bounds[1:]
    of_chunk, chunk_first, chunk_last = _cut(starts, ends, chunk)
    document, first, last = _cut(starts, ends, segment)
    first_chunk = torch.searchsorted(chunk_first, first)
    columns = (first, last, first_chunk, document, last == ends[document], starts[document], ends[document])
    chunk_columns = (chunk_first, chunk_last, chunk_first == starts[of_chunk])
    assert len(columns) == PLACE.value and len(chunk_columns) == CHUNK_PLACE.value
    first_segment = torch.searchsorted(document, torch.arange(len(starts) + 1))

    def table(*each: Tensor) -> Tensor:
        return torch.stack([column.long() for column in each], 1).to(device, torch.int32)

    return Tables(
        segments=table(*columns),
        chunks=table(*chunk_columns),
        bounds=first_segment.to(device, torch.int32),
        whole=bool((ends - starts <= segment).all()),
    )


def packed_changes(p: RunPlan, documents: Documents, device: torch.device) -> dict[str, Any]:
    """Fields of `p`, which was made for the tokens in one run, that differ for `documents`, with their values."""
    key = (p.chunk, p.segment_chunks, device)
    tables = documents.layouts.get(key)
    if tables is None:
        with torch.inference_mode(False):  # made while generating, they may serve training
            tables = documents.layouts[key] = _tables(documents, p.chunk, p.chunk * p.segment_chunks, device)
    chunks, segments = len(tables.chunks), len(tables.segments)
    descriptors = p.descriptors and chunks >= DESCRIPTOR_CHUNKS * segments
    return {"chunks": chunks, "segments": segments, "descriptors": descriptors, "tables": tables}


def places_of(p: RunPlan, otherwise: Tensor) -> Tensor:
    """The table of segments; without documents a kernel reads none, and any tensor will do."""
    return otherwise if p.tables is None else p.tables.segments


def chunks_of(p: RunPlan, otherwise: Tensor) -> Tensor:
    """The table of chunks, likewise."""
    return otherwise if p.tables is None else p.tables.chunks


def bounds_of(p: RunPlan, otherwise: Tensor) -> Tensor:
    """The documents' segments, likewise."""
    return otherwise if p.tables is None else p.tables.bounds
