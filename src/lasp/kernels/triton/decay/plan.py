"""Launch configurations, by rule: no search, so that the first result comes seconds after the first call."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

CHUNK = 64
MIN_SEGMENT_CHUNKS = 4


class Plan(NamedTuple):
    """How a run of one shape is cut and launched.

    Attributes:
        chunk: tokens per chunk.
        segment_chunks: chunks that one program walks.
        segments: of one head.
        summary_columns: columns of the state per program of the summaries.
        columns: columns of the outputs (and state) per program of the sweeps.
        summary_warps, summary_stages, warps, stages: of the summaries and of the sweeps.
        exact: whether decays between tokens are summed pair by pair (fp32).
        precision: of products of fp32 operands.
    """

    chunk: int
    segment_chunks: int
    segments: int
    summary_columns: int
    columns: int
    summary_warps: int
    summary_stages: int
    warps: int
    stages: int
    exact: bool
    precision: str


def tile(dim: int) -> int:
    """The power of two >= 16 that holds `dim` columns."""
    return max(16, 1 << (dim - 1).bit_length())


def segment_chunks(chunks: int, heads: int, processors: int) -> int:
    """Chunks per segment: few enough that `heads` times segments fill the device, many enough that the segments'
    states (K V fp32 numbers each) stay a small part of the traffic."""
    ideal = 3 * math.sqrt(heads * chunks / processors)
    return max(MIN_SEGMENT_CHUNKS, 1 << round(math.log2(ideal)))


@functools.lru_cache(maxsize=256)
def plan(tokens: int, heads: int, K: int, V: int, element_bytes: int, processors: int) -> Plan:
    """The plan for `heads` (batch times value heads) runs of `tokens` > 0 tokens.

    Args:
        element_bytes: 2 (bf16, fp16) or 4 (fp32).
        processors: multiprocessors of the device.
    """
    exact = element_bytes == 4
    chunk = 32 if exact else CHUNK
    chunks = -(-tokens // chunk)
    length = min(segment_chunks(chunks, heads, processors), chunks)
    columns = 32 if exact else 64
    return Plan(
        chunk=chunk,
        segment_chunks=length,
        segments=-(-chunks // length),
        summary_columns=columns,
        columns=columns,
        summary_warps=4,
        summary_stages=3,
        warps=4,
        stages=1 if exact else 3,
        exact=exact,
        precision="ieee" if exact else "tf32",
    )
