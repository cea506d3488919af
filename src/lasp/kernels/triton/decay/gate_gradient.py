"""The gradient of one decay per token, from two scalars per token and the states at the borders of legs (`legs`).

    d_g_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s) + <S_end, D_end>

where the end is the leg's. The sweeps of dq and dk left the scalars in parts, before outputs were rounded; products
inside a chunk cancel exactly in their difference, since both sweeps round the same scores alike. So do q and k as
rounded with their decays: each sweep sums what it reads with the operand rounded as the other adds it to its state. But
products of two chunks are read from a rounded S by one sweep and from a rounded D by the other: what remains of them
adds up over the leg, as a random walk does. At the leg's start it is known, since there d_g is <S, D> too, and is taken
off again, all of it there and less towards the end: what is left is that of a walk tied at both ends, a third of its
variance.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.decay.legs import as_swept, inner_borders, legs_in
from lasp.kernels.triton.decay.place import place, run_bounds


@triton.jit(do_not_specialize=["T", "rows", "H_v", "segments", "segment_chunks", "chunks"])
def gate_gradient_kernel(
    q_sums_ptr,  # fp32 [parts, B, H_v, chunks C]: q . dq
    k_sums_ptr,  # likewise: k . dk
    states_ptr,  # fp32 [B, H_v, segments, K, V]: S, entering each segment; if FROM_ZERO, not read of a run's first
    inner_ptr,  # fp32 [B, H_v, cdiv(chunks, LEG), K, V]: within segments, see `inner_borders`
    state_out_ptr,  # fp32 [B, H_v, K, V]: leaving the run
    d_states_ptr,  # fp32 as states: D, leaving each segment but a run's last
    d_inner_ptr,  # fp32 as inner
    d_state_in_ptr,  # fp32 as state_out: entering the run; unused if FROM_ZERO
    dg_ptr,  # fp32 [B, T, H_v], written
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # None if D leaving the run is zero
    T,
    rows,  # B H_v
    H_v,
    segments,
    segment_chunks,
    chunks,
    SIZE: tl.constexpr,  # K V
    BLOCK: tl.constexpr,  # elements of a state at a time
    C: tl.constexpr,
    TOKENS: tl.constexpr,  # of a leg
    PARTS: tl.constexpr,
    ROUND: tl.constexpr,  # see `as_swept`
    FROM_ZERO: tl.constexpr,  # whether no run has an initial state
    PACKED: tl.constexpr,
):
    leg, head, batch, segment, first, last, chunk, border, ends = place(
        places_ptr, legs_in(segment_chunks), segments, segment_chunks, T, H_v, C, PACKED
    )
    legs = legs_in(tl.cdiv(last - first, C))
    if leg >= legs:  # of a short segment
        return
    run = tl.cast(batch, tl.int64) * H_v + head
    index = run * segments + segment
    begin, _ = run_bounds(places_ptr, T, PACKED)

    inner = inner_borders(inner_ptr, run, chunks, chunk, SIZE) + leg * SIZE
    d_inner = inner_borders(d_inner_ptr, run, chunks, chunk, SIZE) + leg * SIZE
    state = inner
    d_state = d_inner
    known = True
    if leg == 0:
        state = states_ptr + index * SIZE
        d_state = d_states_ptr + (index - 1) * SIZE
        if first == begin:
            d_state = d_state_in_ptr + border * SIZE
            known = not FROM_ZERO
    start = _paired(state, d_state, known, SIZE, BLOCK, ROUND)
    state = inner + SIZE
    d_state = d_inner + SIZE
    known = True
    if leg == legs - 1:
        state = states_ptr + (index + 1) * SIZE
        d_state = d_states_ptr + index * SIZE
        if ends:
            state = state_out_ptr + border * SIZE
            known = d_state_out_ptr is not None
            if d_state_out_ptr is not None:
                d_state = d_state_out_ptr + border * SIZE
    end = _paired(state, d_state, known, SIZE, BLOCK, ROUND)

    slot = chunk * C - first
    first += leg * TOKENS
    last = tl.minimum(first + TOKENS, last)
    at = first + tl.arange(0, TOKENS)
    inside = at < last
    terms = tl.zeros_like(at).to(tl.float32)
    for part in range(PARTS):
        here = (part * rows + run) * (chunks * C) + slot + at
        terms += tl.load(q_sums_ptr + here, mask=inside, other=0.0)
        terms -= tl.load(k_sums_ptr + here, mask=inside, other=0.0)
    drift = (end + tl.sum(terms) - start) / (last - first)
    dg = end + tl.cumsum(terms, 0, reverse=True) - drift * (last - at).to(tl.float32)
    tl.store(dg_ptr + (batch * tl.cast(T, tl.int64) + at) * H_v + head, dg, mask=inside)


@triton.jit
def _paired(state_ptr, d_state_ptr, known, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """<S, D> of two states, or zero where one is zero and not there."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SIZE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = (at < SIZE) & known
        state = tl.load(state_ptr + at, mask=inside, other=0.0)
        total += state * as_swept(tl.load(d_state_ptr + at, mask=inside, other=0.0), ROUND)
    return tl.sum(total)
