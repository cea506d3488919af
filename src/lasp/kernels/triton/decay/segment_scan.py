# mypy: ignore-errors
"""The scan over a rank's segments: each segment's total is replaced by the state that enters the segment.

Starting from zero: the part of other ranks (or an initial state) is applied by the sweep that reads the states,
weighted with the decay from the run's start to the segment, which is written here too. Segments are walked in
order (REVERSE: from the last to the first, for gradients); every state element is on its own.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import LOG2_E, decayed

SCAN_BLOCK, SCAN_WARPS = 256, 2
UNROLL = tl.constexpr(4)  # loads in flight per thread; the body below is written out for it


@triton.jit(do_not_specialize=["segments", "H_v"])
def scan_kernel(
    states_ptr,  # fp32 [B, H_v, segments, K, V]: totals, replaced by the state entering each segment
    decays_ptr,  # fp32 [B, H_v, segments, D], base 2
    before_ptr,  # like decays, written: the decay from the run's start (REVERSE: end) to each segment
    bounds_ptr,  # int32 [documents + 1] if PACKED: the segments of each document
    total_decay_ptr,  # fp32 [B or documents, H_v, D]: the whole run's natural log-decay, written
    total_ptr,  # fp32 [B or documents, H_v, K, V]: the whole run's total, written; or None, and both are not wanted
    segments,
    H_v,
    SIZE: tl.constexpr,  # K * V
    V: tl.constexpr,
    D: tl.constexpr,  # decays a head: 1, or K
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    run = (tl.program_id(0) // blocks).to(tl.int64)
    flat = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = flat < SIZE
    if D == 1:
        channel = flat * 0
        writes = flat == 0
    else:
        channel = flat // V
        writes = inside & (flat % V == 0)
    begin = run * segments
    if PACKED:
        document = tl.load(bounds_ptr + run // H_v)
        begin = run % H_v * segments + document
        segments = tl.load(bounds_ptr + run // H_v + 1) - document
    states_ptr += begin * SIZE + flat
    decays_ptr += begin * D + channel
    before_ptr += begin * D + channel
    # Between thousands of segments each rounding of a slow decay counts.
    state = tl.zeros((BLOCK,), tl.float64 if EXACT else tl.float32)
    decay = tl.zeros((BLOCK,), tl.float64)
    for block in range(tl.cdiv(segments, UNROLL)):
        # Loads first: a store in between would keep the compiler from issuing the next load early.
        i0 = block * UNROLL
        i1 = i0 + 1
        i2 = i0 + 2
        i3 = i0 + 3
        m0 = inside & (i0 < segments)
        m1 = inside & (i1 < segments)
        m2 = inside & (i2 < segments)
        m3 = inside & (i3 < segments)
        if REVERSE:
            i0 = segments - 1 - i0
            i1 = segments - 1 - i1
            i2 = segments - 1 - i2
            i3 = segments - 1 - i3
        x0 = tl.load(states_ptr + tl.cast(i0, tl.int64) * SIZE, mask=m0, other=0.0)
        x1 = tl.load(states_ptr + tl.cast(i1, tl.int64) * SIZE, mask=m1, other=0.0)
        x2 = tl.load(states_ptr + tl.cast(i2, tl.int64) * SIZE, mask=m2, other=0.0)
        x3 = tl.load(states_ptr + tl.cast(i3, tl.int64) * SIZE, mask=m3, other=0.0)
        d0 = tl.load(decays_ptr + i0 * D, mask=m0, other=0.0)
        d1 = tl.load(decays_ptr + i1 * D, mask=m1, other=0.0)
        d2 = tl.load(decays_ptr + i2 * D, mask=m2, other=0.0)
        d3 = tl.load(decays_ptr + i3 * D, mask=m3, other=0.0)
        s1 = decayed(state, d0, EXACT) + x0
        s2 = decayed(s1, d1, EXACT) + x1
        s3 = decayed(s2, d2, EXACT) + x2
        tl.store(states_ptr + tl.cast(i0, tl.int64) * SIZE, state, mask=m0)
        tl.store(states_ptr + tl.cast(i1, tl.int64) * SIZE, s1, mask=m1)
        tl.store(states_ptr + tl.cast(i2, tl.int64) * SIZE, s2, mask=m2)
        tl.store(states_ptr + tl.cast(i3, tl.int64) * SIZE, s3, mask=m3)
        state = decayed(s3, d3, EXACT) + x3
        before = decay.to(tl.float32)
        tl.store(before_ptr + i0 * D, before, mask=m0 & writes)
        tl.store(before_ptr + i1 * D, before + d0, mask=m1 & writes)
        tl.store(before_ptr + i2 * D, before + d0 + d1, mask=m2 & writes)
        tl.store(before_ptr + i3 * D, before + d0 + d1 + d2, mask=m3 & writes)
        decay += d0 + d1 + d2 + d3
    if total_ptr is not None:
        tl.store(total_ptr + run * SIZE + flat, state, mask=inside)
        tl.store(total_decay_ptr + run * D + channel, decay.to(tl.float32) / LOG2_E, mask=writes)
