# mypy: ignore-errors
"""The sums of gates per token that all other kernels read: a scan in each of their chunks would make them wait."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import log2_gate
from lasp.kernels.triton.common.program import chunk_place


@triton.jit(do_not_specialize=["T", "H_v", "chunks"])
def gate_sums_kernel(
    g_ptr,  # [B, T, H_v]
    prefix_ptr,  # fp32 [B, H_v, chunks C], written, also past a chunk's end, so that it is loaded without a mask
    suffix_ptr,  # likewise, if EXACT
    places_ptr,  # int32 [chunks, 3] if PACKED
    T,
    H_v,
    chunks,
    C: tl.constexpr,
    HEADS: tl.constexpr,  # that a program has
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
):
    chunk = tl.program_id(0)
    first, last = chunk_place(places_ptr, chunk, T, C, PACKED)
    groups = tl.cdiv(H_v, HEADS)
    batch = tl.cast(tl.program_id(1) // groups, tl.int64)
    head = tl.program_id(1) % groups * HEADS + tl.arange(0, HEADS)[None, :]
    i = tl.arange(0, C)[:, None]
    gates = g_ptr + (batch * T + first + i) * H_v + head
    sums = ((batch * H_v + head) * chunks + chunk) * C + i
    prefix = tl.cumsum(log2_gate(gates, (first + i < last) & (head < H_v)), 0)
    tl.store(prefix_ptr + sums, prefix, mask=head < H_v)
    if EXACT:
        later = log2_gate(gates + H_v, (first + i + 1 < last) & (head < H_v))
        tl.store(suffix_ptr + sums, tl.cumsum(later, 0, reverse=True), mask=head < H_v)
