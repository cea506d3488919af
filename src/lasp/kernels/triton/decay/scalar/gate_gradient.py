# mypy: ignore-errors
"""The gradient of one decay per token: what crosses the token.

    d_g_t = across + sum_{i >= t} reads_q_i + sum_{j < t} reads_k_j + sum_{i >= t > j} w_ij       i, j in t's chunk
    w_ij = scale 2^between(j, i) (q_i . k_j) (do_i . v_j)

reads_q_i is what q_i reads from the state that enters the chunk, times do_i; reads_k_j what k_j adds to the state that
leaves it, times that state's gradient. The sweeps of dq and dk left both in parts. `across` passes the whole chunk,
from the states before it to what comes after it, and is not known as such. But d_g is <S, D> at both ends of an
interval (`operands`), and from one chunk to the next

    d_g before a chunk = across + sum reads_q,        after it = across + sum reads_k

so it is followed through the chunks. States are rounded as they are read, S by one sweep and D by the other: what
remains of that adds up as a random walk does, and is tied at both ends, a third of its variance. At a run's end the
gradient of a final state may be large where gates forget, and d_g next to nothing: there `across` is what the d_g
before the chunk leaves of it, all of which is decayed by the chunk's first gate as d_g is. Where far less passes a
chunk than one of its tokens, nothing does: `across` is zero, and the walk ends and starts anew. So it is, exactly, in
the first chunk of a run that starts from no state, and in the last of one whose final state has no gradient.

Pairs within a chunk are the difference of what both sweeps sum of it: what does not cross t cancels to fp32, since they
round the scores alike. That is next to all of it where gates forget within a few tokens: there, and for fp32 inputs,
w is formed and summed, by `gate_pairs`.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import TOKEN, beyond_one, head_gates, head_rate
from lasp.kernels.triton.common.program import as_swept, place, run_bounds
from lasp.kernels.triton.decay.scalar.operands import inner_borders, intervals_in


@triton.jit(do_not_specialize=["T", "rows", "H_v", "segments", "segment_chunks", "chunks"])
def gate_gradient_kernel(
    g_ptr,  # [H_v] or [B, T, H_v]
    prefix_ptr,  # fp32 [B, H_v, chunks C] or unused
    q_sums_ptr,  # fp32 [parts, 2, B, H_v, chunks C]: q . dq, of the state and, unless EXACT, of the chunk
    k_sums_ptr,  # likewise: k . dk
    states_ptr,  # fp32 [B, H_v, segments, K, V]: S, entering each segment; if FROM_ZERO, not read of a run's first
    inner_ptr,  # fp32 [B, H_v, intervals, K, V]: within segments, see `inner_borders`
    state_out_ptr,  # fp32 [B, H_v, K, V]: leaving the run
    d_states_ptr,  # fp32 as states: D, leaving each segment but a run's last
    d_inner_ptr,  # fp32 as inner
    d_state_in_ptr,  # fp32 as state_out: entering the run; unused if FROM_ZERO
    dg_ptr,  # fp32 [B, T, H_v], written; of chunks whose pairs are formed it has their sums
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # None if D leaving the run is zero
    T,
    rows,  # B H_v
    H_v,
    segments,
    segment_chunks,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a state at a time
    C: tl.constexpr,
    INTERVAL_CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    FORGETS: tl.constexpr,  # what is less than rounding changes, base 2, see `beyond_one`
    ROUND: tl.constexpr,  # see `as_swept`
    EXACT: tl.constexpr,
    FROM_ZERO: tl.constexpr,  # whether no run has an initial state
    PACKED: tl.constexpr,
):
    SIZE: tl.constexpr = K * V
    interval, head, batch, segment, first, last, chunk, border, ends = place(
        places_ptr, intervals_in(segment_chunks, EXACT), segments, segment_chunks, T, H_v, C, PACKED
    )
    intervals = intervals_in(tl.cdiv(last - first, C), EXACT)
    if interval >= intervals:  # of a short segment
        return
    run = tl.cast(batch, tl.int64) * H_v + head
    index = run * segments + segment
    begin, _ = run_bounds(places_ptr, T, PACKED)

    inner = inner_borders(inner_ptr, run, chunks, chunk, SIZE, EXACT) + interval * SIZE
    d_inner = inner_borders(d_inner_ptr, run, chunks, chunk, SIZE, EXACT) + interval * SIZE
    state = inner
    d_state = d_inner
    from_nothing = False
    if interval == 0:
        state = states_ptr + index * SIZE
        d_state = d_states_ptr + (index - 1) * SIZE
        if first == begin:
            d_state = d_state_in_ptr + border * SIZE
            from_nothing = FROM_ZERO
    start = _paired(state, d_state, from_nothing == 0, SIZE, BLOCK, ROUND)
    state = inner + SIZE
    d_state = d_inner + SIZE
    to_nothing = False
    if interval == intervals - 1:
        state = states_ptr + (index + 1) * SIZE
        d_state = d_states_ptr + index * SIZE
        if ends:
            state = state_out_ptr + border * SIZE
            to_nothing = d_state_out_ptr is None
            if d_state_out_ptr is not None:
                d_state = d_state_out_ptr + border * SIZE
    end = _paired(state, d_state, to_nothing == 0, SIZE, BLOCK, ROUND)

    slot = chunk * C - first
    first += interval * INTERVAL_CHUNKS * C
    last = tl.minimum(first + INTERVAL_CHUNKS * C, last)
    count = tl.cdiv(last - first, C)
    c = tl.arange(0, INTERVAL_CHUNKS)
    i = tl.arange(0, C)[None, :]
    at = first + c[:, None] * C + i
    inside = at < last
    reads_q = tl.zeros((INTERVAL_CHUNKS, C), tl.float32)
    reads_k = tl.zeros((INTERVAL_CHUNKS, C), tl.float32)
    pairs = tl.zeros((INTERVAL_CHUNKS, C), tl.float32)
    padded = chunks * C
    for part in range(PARTS):
        here = (part * 2 * rows + run) * padded + slot + at
        reads_q += tl.load(q_sums_ptr + here, mask=inside, other=0.0)
        reads_k += tl.load(k_sums_ptr + here, mask=inside, other=0.0)
        if not EXACT:
            here += tl.cast(rows, tl.int64) * padded
            pairs += tl.load(q_sums_ptr + here, mask=inside, other=0.0)
            pairs -= tl.load(k_sums_ptr + here, mask=inside, other=0.0)

    g_ptr = head_gates(g_ptr, batch, head, T, H_v, KIND)
    prefix_ptr += run * padded + slot
    rate = head_rate(g_ptr, KIND)
    lengths = tl.minimum(last - first - c * C, C)
    totals = lengths * rate
    if KIND == TOKEN:
        totals = tl.load(prefix_ptr + first + c * C + C - 1, mask=c < count, other=0.0)
    forgets = (beyond_one(totals, lengths) < FORGETS) & (c < count)
    formed = c < count if EXACT else forgets
    dg_at = dg_ptr + batch * tl.cast(T, tl.int64) * H_v + head
    dg_at += at * tl.cast(H_v, tl.int64)
    # No pair of a chunk crosses its first token.
    within = tl.where(i == 0, 0.0, tl.cumsum(pairs, 1, reverse=True))
    within = tl.where(formed[:, None], tl.load(dg_at, mask=inside & formed[:, None], other=0.0), within)

    first_cut = from_nothing & (c == 0)
    last_cut = to_nothing & (c == count - 1)
    cut = forgets | first_cut | last_cut
    ends &= interval == intervals - 1
    across = _across(tl.sum(reads_q, 1), tl.sum(reads_k, 1), cut, start, end, ends, count, c)
    # Nothing of a chunk's last token, large as it may be: it crosses none.
    reads_k = tl.where((i == C - 1) | (at == last - 1), 0.0, reads_k)
    earlier = tl.cumsum(reads_k, 1) - reads_k
    dg = across[:, None] + tl.cumsum(reads_q, 1, reverse=True) + earlier + within
    tl.store(dg_at, dg, mask=inside)


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


@triton.jit
def _across(q, k, cut, start, end, ends, count, c):
    """Sum what passes each chunk, from the sums of reads [chunks] by q and by k: nothing where `cut`. Of a span of
    others it is followed from the known d_g before the first, and tied to that after the last, `drift` a chunk."""
    here = c[:, None]
    other = c[None, :]
    is_cut = cut[None, :]
    right = tl.min(tl.where(is_cut & (other > here), other, count), 1)  # the first chunk after the span
    left = tl.max(tl.where(is_cut & (other < here), other + 1, 0), 1)  # the first of the span
    gained = tl.where(cut, 0.0, k - q)[None, :]
    span = (other >= left[:, None]) & (other < right[:, None])
    earlier = tl.sum(tl.where(span & (other < here), gained, 0.0), 1)
    whole = tl.sum(tl.where(span, gained, 0.0), 1)
    after = tl.sum(tl.where(other == right[:, None], q[None, :], 0.0), 1) + tl.where(right == count, end, 0.0)
    before = tl.sum(tl.where(other + 1 == left[:, None], k[None, :], 0.0), 1) + tl.where(left == 0, start, 0.0)
    drift = (after - whole - before) / (right - left)
    share = tl.where(ends & (right == count), 0.0, 0.5)
    return tl.where(cut, 0.0, before + earlier - q + drift * (c - left + share))
