"""The sums of gates per token that sweeps read, where no summary leaves them."""

import triton
import triton.language as tl

from lasp.kernels.triton.decay.gates import TOKEN, head_gates, store_sums, sum_gates
from lasp.kernels.triton.decay.place import place


@triton.jit(do_not_specialize=["T", "H_v", "segments", "segment_chunks", "chunks"])
def gate_sums_kernel(
    g_ptr,  # [B, T, H_v]
    prefix_ptr,  # fp32 [B, H_v, chunks C], written
    suffix_ptr,  # likewise, if EXACT
    places_ptr,  # int32 [segments, 7] if PACKED
    T,
    H_v,
    segments,
    segment_chunks,
    chunks,
    C: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
):
    _, head, batch, _, first, last, chunk, _, _ = place(places_ptr, 1, segments, segment_chunks, T, H_v, C, PACKED)
    g_ptr = head_gates(g_ptr, batch, head, T, H_v, TOKEN)
    slot = (tl.cast(batch, tl.int64) * H_v + head) * chunks * C + chunk * C - first
    for step in range(tl.cdiv(last - first, C)):
        start = first + step * C
        length = tl.minimum(last - start, C)
        sums = sum_gates(g_ptr + tl.cast(start, tl.int64) * H_v, H_v, length, C)
        store_sums(prefix_ptr, suffix_ptr, slot + start, sums[0], sums[1], C, EXACT)
