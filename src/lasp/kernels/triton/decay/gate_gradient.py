"""The gradient of one decay per token, from two scalars per token.

    d_g_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s) + <S_end, D_end>

where the end is the leg's (`legs`). The sweeps of dq and dk left the scalars in parts, before outputs were rounded;
products inside a chunk cancel exactly in their difference, since both sweeps round the same scores alike. So do q and
k as rounded with their decays: each sweep sums what it reads with the operand rounded as the other adds it to its
state. But products of two chunks are read from a rounded S by one sweep and from a rounded D by the other: what
remains of them adds up over the leg, as a random walk does. At the leg's start it is known, since there d_g is <S, D>
too, and is taken off again, all of it there and less towards the end: what is left is that of a walk tied at both
ends, a third of its variance.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.decay.legs import borders_of
from lasp.kernels.triton.decay.place import place


@triton.jit(do_not_specialize=["T", "rows", "H_v", "segments", "segment_chunks", "chunks"])
def gate_gradient_kernel(
    q_sums_ptr,  # fp32 [parts, B, H_v, chunks C]: q . dq
    k_sums_ptr,  # likewise: k . dk
    pairs_ptr,  # fp32 [slices, B, H_v, segments, borders]
    dg_ptr,  # fp32 [B, T, H_v], written
    places_ptr,  # int32 [segments, 7] if PACKED
    T,
    rows,  # B H_v
    H_v,
    segments,
    segment_chunks,
    chunks,
    C: tl.constexpr,
    TOKENS: tl.constexpr,  # of a leg
    PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    PACKED: tl.constexpr,
):
    legs = borders_of(segment_chunks) - 1
    leg, head, batch, segment, first, last, chunk, _, _ = place(
        places_ptr, legs, segments, segment_chunks, T, H_v, C, PACKED
    )
    run = tl.cast(batch, tl.int64) * H_v + head
    slot = chunk * C - first
    # A short segment has fewer legs: of others nothing is inside.
    first += leg * TOKENS
    last = tl.minimum(first + TOKENS, last)
    at = first + tl.arange(0, TOKENS)
    inside = at < last

    terms = tl.zeros_like(at).to(tl.float32)
    for part in range(PARTS):
        here = (part * rows + run) * (chunks * C) + slot + at
        terms += tl.load(q_sums_ptr + here, mask=inside, other=0.0)
        terms -= tl.load(k_sums_ptr + here, mask=inside, other=0.0)
    start = 0.0
    end = 0.0
    for part in range(SLICES):
        pair = pairs_ptr + ((part * rows + run) * segments + segment) * (legs + 1) + leg
        start += tl.load(pair)
        end += tl.load(pair + 1)
    drift = (end + tl.sum(terms) - start) / tl.maximum(last - first, 1)
    dg = end + tl.cumsum(terms, 0, reverse=True) - drift * (last - at).to(tl.float32)
    tl.store(dg_ptr + (batch * tl.cast(T, tl.int64) + at) * H_v + head, dg, mask=inside)
