# mypy: ignore-errors
"""The gradient of one decay per token: what crosses the token.

    d_g_t = across + sum_{i >= t} reads_q_i + sum_{j < t} reads_k_j + sum_{i >= t > j} w_ij       i, j in t's chunk
    w_ij = scale 2^between(j, i) (q_i . k_j) (do_i . v_j)

reads_q_i is what q_i reads from the state that enters the chunk, times do_i; reads_k_j what k_j adds to the state that
leaves it, times that state's gradient. The sweeps of dq and dk left both in parts. `across` passes the whole chunk,
from the states before it to what comes after it, and is not known as such. But d_g is <S, D> at both ends of an
interval (`intervals`), and from one chunk to the next

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
from lasp.kernels.triton.decay.intervals import first_interval, interval_of
from lasp.kernels.triton.decay.scalar.gate_pairs import are_near


@triton.jit(do_not_specialize=["T", "rows", "H_v", "segments", "segment_chunks", "chunks"])
def gate_gradient_kernel(
    g_ptr,  # [H_v] or [B, T, H_v]
    prefix_ptr,  # fp32 [B, H_v, chunks C] or unused
    q_sums_ptr,  # fp32 [parts, 2, B, H_v, chunks C]: q . dq, of the state and, unless EXACT, of the chunk
    k_sums_ptr,  # likewise: k . dk
    inner_ptr,  # bf16 or fp32 [B, H_v, chunks / SHORTEST + segments, 2, SIZE]: S and D before intervals
    state_out_ptr,  # fp32 [B, H_v, K, V]: S leaving the run
    dg_ptr,  # fp32 [B, T, H_v], written; of chunks whose pairs are formed it has their sums
    dw_ptr,  # fp32 [B, T, H_v], written if WEIGHS: the gradient of the logarithms of tokens' weights, k . dk
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # likewise: D, or None for zero
    T,
    rows,  # B H_v
    H_v,
    segments,
    segment_chunks,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a state at a time
    C: tl.constexpr,
    SHORTEST: tl.constexpr,  # interval, in chunks: see `interval_of`
    LONGEST: tl.constexpr,  # which is what a program has
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    FORGETS: tl.constexpr,  # what is less than rounding changes, base 2, see `beyond_one`
    ROUND: tl.constexpr,  # see `as_swept`
    EXACT: tl.constexpr,
    FROM_ZERO: tl.constexpr,  # whether no run has an initial state
    PACKED: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    stretch, head, batch, segment, first, last, chunk, border, ends = place(
        places_ptr, tl.cdiv(segment_chunks, LONGEST), segments, segment_chunks, T, H_v, C, PACKED
    )
    of_segment = tl.cdiv(last - first, C)
    stretches = tl.cdiv(of_segment, LONGEST)
    if stretch >= stretches:  # of a short segment
        return
    run = tl.cast(batch, tl.int64) * H_v + head
    padded = chunks * C
    slot = chunk * C - first
    g_ptr = head_gates(g_ptr, batch, head, T, H_v, KIND)
    prefix_ptr += run * padded + slot
    rate = head_rate(g_ptr, KIND)
    interval = interval_of(prefix_ptr + first, rate, of_segment, C, KIND, SHORTEST, LONGEST)
    run_first, run_last = run_bounds(places_ptr, T, PACKED)
    from_nothing = (stretch == 0) & (first == run_first) & FROM_ZERO
    ends &= stretch == stretches - 1
    to_nothing = ends & (d_state_out_ptr is None)

    first += stretch * LONGEST * C
    last = tl.minimum(first + LONGEST * C, last)
    count = tl.cdiv(last - first, C)
    c = tl.arange(0, LONGEST)
    i = tl.arange(0, C)[None, :]
    at = first + c[:, None] * C + i
    inside = at < last
    starts = (c % interval == 0) & (c < count)
    stops = (c % interval == interval - 1) | (c == count - 1)
    # <S, D> before each chunk, and after each, where it is known.
    before = tl.zeros((LONGEST,), tl.float32)
    after = tl.zeros((LONGEST,), tl.float32)
    walked = stretch * LONGEST
    first_state = first_interval(run, segment, chunk, segments, chunks, SHORTEST)
    for begin in range(0, count, interval):
        at_begin = inner_ptr + (first_state + (walked + begin) // SHORTEST) * (2 * SIZE)
        known = _paired(at_begin, at_begin + SIZE, SIZE, BLOCK, False)
        before = tl.where(c == begin, known, before)
        after = tl.where(c == begin - 1, known, after)
    if not ends:
        # What the next stretch, or the next segment, begins with.
        next_state = first_state + (walked + count) // SHORTEST
        if walked + count == of_segment:
            next_state = first_interval(run, segment + 1, chunk + of_segment, segments, chunks, SHORTEST)
        following = inner_ptr + next_state * (2 * SIZE)
        known = _paired(following, following + SIZE, SIZE, BLOCK, False)
        after = tl.where(c == count - 1, known, after)
    elif d_state_out_ptr is not None:
        leaving = border * (K * V)
        known = _paired(state_out_ptr + leaving, d_state_out_ptr + leaving, K * V, BLOCK, ROUND)
        after = tl.where(c == count - 1, known, after)
    reads_q = tl.zeros((LONGEST, C), tl.float32)
    reads_k = tl.zeros((LONGEST, C), tl.float32)
    pairs = tl.zeros((LONGEST, C), tl.float32)
    dw = tl.zeros((LONGEST, C), tl.float32)
    for part in range(PARTS):
        here = (part * 2 * rows + run) * padded + slot + at
        reads_q += tl.load(q_sums_ptr + here, mask=inside, other=0.0)
        reads_k += tl.load(k_sums_ptr + here, mask=inside, other=0.0)
        if not EXACT:
            here += tl.cast(rows, tl.int64) * padded
            pairs += tl.load(q_sums_ptr + here, mask=inside, other=0.0)
            of_chunk = tl.load(k_sums_ptr + here, mask=inside, other=0.0)
            pairs -= of_chunk
            if WEIGHS:
                dw += of_chunk

    lengths = tl.minimum(last - first - c * C, C)
    totals = lengths * rate
    if KIND == TOKEN:
        totals = tl.load(prefix_ptr + first + c * C + C - 1, mask=c < count, other=0.0)
    forgets = (beyond_one(totals, lengths) < FORGETS) & (c < count)
    formed = c < count if EXACT else forgets
    token = batch * tl.cast(T, tl.int64) * H_v + head + at * tl.cast(H_v, tl.int64)
    dg_at = dg_ptr + token
    if WEIGHS:
        tl.store(dw_ptr + token, dw + reads_k, mask=inside)
    # No pair of a chunk crosses its first token.
    within = tl.where(i == 0, 0.0, tl.cumsum(pairs, 1, reverse=True))
    within = tl.where(formed[:, None], tl.load(dg_at, mask=inside & formed[:, None], other=0.0), within)

    first_cut = from_nothing & (c == 0)
    last_cut = to_nothing & (c == count - 1)
    cut = forgets | first_cut | last_cut
    sums_q = tl.sum(reads_q, 1)
    sums_k = tl.sum(reads_k, 1)
    if EXACT:
        near = _is_near(prefix_ptr, totals, rate, first + c * C, run_first, run_last, C, KIND) & (c < count)
        # All that crosses a chunk's first token is what passes the chunk, which `gate_pairs` has formed.
        passed = tl.where(near, tl.sum(tl.where(i == 0, within, 0.0), 1), 0.0)
        cut = cut | near
        sums_q += passed
        sums_k += passed
    across = _across(sums_q, sums_k, cut, starts, before, stops, after, ends, count, c)
    # Nothing of a chunk's last token, large as it may be: it crosses none.
    reads_k = tl.where((i == C - 1) | (at == last - 1), 0.0, reads_k)
    earlier = tl.cumsum(reads_k, 1) - reads_k
    dg = across[:, None] + tl.cumsum(reads_q, 1, reverse=True) + earlier + within
    tl.store(dg_at, dg, mask=inside)


@triton.jit
def _is_near(prefix_ptr, totals, rate, start, run_first, run_last, C: tl.constexpr, KIND: tl.constexpr):
    """True where what passes chunks that begin with tokens `start` was formed, as `gate_pairs` decides it."""
    between = (start > run_first) & (start + C < run_last)
    earlier = tl.zeros_like(totals) + C * rate
    later = tl.minimum(run_last - start - C, C) * rate
    if KIND == TOKEN:
        earlier = tl.load(prefix_ptr + start - 1, mask=between, other=0.0)
        later = tl.load(prefix_ptr + start + 2 * C - 1, mask=between, other=0.0)
    return between & are_near(earlier, totals, later)


@triton.jit
def _paired(state_ptr, d_state_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """<S, D> of two states of so many elements; ROUND: D as keys in bf16 read it, as the others are."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SIZE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        state = tl.load(state_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)
        d_state = tl.load(d_state_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)
        total += state * as_swept(d_state, ROUND)
    return tl.sum(total)


@triton.jit
def _across(q, k, cut, starts, before, stops, after, ends, count, c):
    """Sum what passes each chunk, of the sums of reads [chunks] by q and by k: nothing where `cut`. From one of those,
    or from an interval's first chunk, of `starts`, to the next one, or the last, of `stops`, it is followed from the
    known d_g before the first, and tied to that after the last, `drift` a chunk."""
    here = c[:, None]
    other = c[None, :]
    is_cut = cut[None, :]
    # The first chunk after the span, and the first of the span.
    right = tl.min(tl.where((is_cut | starts[None, :]) & (other > here), other, count), 1)
    left = tl.max(tl.where((is_cut | stops[None, :]) & (other < here), other + 1, 0), 1)
    gained = tl.where(cut, 0.0, k - q)[None, :]
    span = (other >= left[:, None]) & (other < right[:, None])
    earlier = tl.sum(tl.where(span & (other < here), gained, 0.0), 1)
    whole = tl.sum(tl.where(span, gained, 0.0), 1)
    # Where an interval does not end, a chunk that is cut does.
    next_q = tl.where(starts, 0.0, q)[None, :]
    last_k = tl.where(stops, 0.0, k)[None, :]
    is_next = other == right[:, None]
    is_last = other + 1 == left[:, None]
    at_end = tl.sum(tl.where(is_next, next_q, 0.0) + tl.where(other + 1 == right[:, None], after[None, :], 0.0), 1)
    at_begin = tl.sum(tl.where(other == left[:, None], before[None, :], 0.0) + tl.where(is_last, last_k, 0.0), 1)
    drift = (at_end - whole - at_begin) / (right - left)
    share = tl.where(ends & (right == count), 0.0, 0.5)
    return tl.where(cut, 0.0, at_begin + earlier - q + drift * (c - left + share))
