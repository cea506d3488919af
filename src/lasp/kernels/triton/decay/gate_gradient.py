"""The gradient of one decay per token, from two scalars per token.

    d_g_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s) + <S_end, D_end>

within a segment, where the end is the segment's. The sweeps of dq and dk left the scalars in parts, before anything was
rounded; products inside a chunk cancel exactly in their difference, since both sweeps round the same scores alike.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.decay.sweep import place


@triton.jit(do_not_specialize=["T", "rows", "H_v", "segments", "segment_chunks", "chunks"])
def gate_gradient_kernel(
    q_sums_ptr,  # fp32 [parts, B, H_v, chunks C]: q . dq
    k_sums_ptr,  # likewise: k . dk
    carry_ptr,  # fp32 [slices, B, H_v, segments]
    dg_ptr,  # fp32 [B, T, H_v], written
    places_ptr,  # int32 [segments, 5] if PACKED
    T,
    rows,  # B H_v
    H_v,
    segments,
    segment_chunks,
    chunks,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens at a time
    PACKED: tl.constexpr,
):
    run = tl.cast(tl.program_id(0), tl.int64)
    _, _, _, segment, first, last, chunk, _, _ = place(places_ptr, 1, segments, segment_chunks, T, H_v, C, PACKED)
    slot = chunk * C - first
    carry = 0.0
    for part in range(SLICES):
        carry += tl.load(carry_ptr + (part * rows + run) * segments + segment)
    out_ptr = dg_ptr + (run // H_v * T) * H_v + run % H_v
    blocks = tl.cdiv(last - first, BLOCK)
    for step in range(blocks):
        at = first + (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        inside = at < last
        terms = tl.zeros((BLOCK,), tl.float32)
        for part in range(PARTS):
            here = (part * rows + run) * chunks * C + slot + at
            terms += tl.load(q_sums_ptr + here, mask=inside, other=0.0)
            terms -= tl.load(k_sums_ptr + here, mask=inside, other=0.0)
        tl.store(out_ptr + tl.cast(at, tl.int64) * H_v, carry + tl.cumsum(terms, 0, reverse=True), mask=inside)
        carry += tl.sum(terms, 0)
