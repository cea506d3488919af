"""The gradient of one decay per token, from two scalars per token.

    d_g_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s) + <S_end, D_end>

within a segment, where the end is the segment's. The sweeps of dq and dk left the scalars in parts, before outputs were
rounded; products inside a chunk cancel exactly in their difference, since both sweeps round the same scores alike. So
do q and k as rounded with their decays: each sweep sums what it reads with the operand rounded as the other adds it to
its state. But products of two
chunks are read from a rounded S by one sweep and from a rounded D by the other: what remains of them adds up over the
segment, as a random walk does. At the segment's start it is known, since there d_g is <S, D> at the end of the
segment before (zero where the run starts from no state), and is taken off again, all of it there and less towards the
end: what is left is that of a walk tied at both ends, a third of its variance.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.decay.place import PLACE, place


@triton.jit(do_not_specialize=["T", "rows", "H_v", "segments", "segment_chunks", "chunks"])
def gate_gradient_kernel(
    q_sums_ptr,  # fp32 [parts, B, H_v, chunks C]: q . dq
    k_sums_ptr,  # likewise: k . dk
    carry_ptr,  # fp32 [slices, B, H_v, segments]
    dg_ptr,  # fp32 [B, T, H_v], written
    places_ptr,  # int32 [segments, 7] if PACKED
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
    FROM_ZERO: tl.constexpr,  # whether no run has an initial state
    PACKED: tl.constexpr,
):
    run = tl.cast(tl.program_id(0), tl.int64)
    _, _, _, segment, first, last, chunk, _, _ = place(places_ptr, 1, segments, segment_chunks, T, H_v, C, PACKED)
    slot = chunk * C - first
    end = _pairing(carry_ptr, rows, run, segments, segment, SLICES)
    blocks = tl.cdiv(last - first, BLOCK)
    start = end
    for step in range(blocks):
        at = first + step * BLOCK + tl.arange(0, BLOCK)
        start += tl.sum(_terms(q_sums_ptr, k_sums_ptr, at, last, slot, rows, run, chunks * C, PARTS))
    first_of_run = segment == 0
    if PACKED:
        first_of_run = first_of_run | (tl.load(places_ptr + tl.maximum(segment - 1, 0) * PLACE + 4) != 0)
    before = _pairing(carry_ptr, rows, run, segments, tl.maximum(segment - 1, 0), SLICES)
    known = before if not FROM_ZERO else tl.where(first_of_run, 0.0, before)
    drift = (start - known) / tl.maximum(last - first, 1)
    if not FROM_ZERO:
        drift = tl.where(first_of_run, 0.0, drift)

    carry = end
    out_ptr = dg_ptr + (run // H_v * T) * H_v + run % H_v
    for step in range(blocks):
        at = first + (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        terms = _terms(q_sums_ptr, k_sums_ptr, at, last, slot, rows, run, chunks * C, PARTS)
        dg = carry + tl.cumsum(terms, 0, reverse=True) - drift * (last - at).to(tl.float32)
        tl.store(out_ptr + tl.cast(at, tl.int64) * H_v, dg, mask=at < last)
        carry += tl.sum(terms, 0)


@triton.jit
def _pairing(carry_ptr, rows, run, segments, segment, SLICES: tl.constexpr):
    """<S, D> at the end of a segment."""
    found = 0.0
    for part in range(SLICES):
        found += tl.load(carry_ptr + (part * rows + run) * segments + segment)
    return found


@triton.jit
def _terms(q_sums_ptr, k_sums_ptr, at, last, slot, rows, run, padded, PARTS: tl.constexpr):
    """q . dq - k . dk of tokens `at`, 0 from `last` on."""
    inside = at < last
    terms = tl.zeros_like(at).to(tl.float32)
    for part in range(PARTS):
        here = (part * rows + run) * padded + slot + at
        terms += tl.load(q_sums_ptr + here, mask=inside, other=0.0)
        terms -= tl.load(k_sums_ptr + here, mask=inside, other=0.0)
    return terms
