# mypy: ignore-errors
"""The gradient of a gate per channel at chunks: what passes through each, of what both sweeps of keys left.

dg at a chunk's end is S D summed over V: that at the segment's end, plus what queries of later chunks read and minus
what keys add to them (`sums` of channel_inter_chunk). Less what the chunk's own keys add, it is `through`: what passes
from before the chunk to after it. Nothing does in a channel that forgets within the chunk: there the sums start anew,
and what leaves the chunk is what its own tokens add. What rounding adds to the sums, a random walk, is known where an
interval begins, for which both states are there: it is taken off, less towards the interval's end. Through its first
chunk goes what S D leaves of it, all of which is decayed by the first gates as dg is.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import beyond_one
from lasp.kernels.triton.common.program import as_swept, run_bounds, run_of, sweep_place, tile_at
from lasp.kernels.triton.decay.channel.decays import channel_tile, gate_heads_of
from lasp.kernels.triton.decay.channel.inter_chunk import AT_A_TIME, interval_of_channels
from lasp.kernels.triton.decay.intervals import first_interval, next_interval


@triton.jit(do_not_specialize=["T", "H_g", "H_v", "segments", "segment_chunks", "chunks"])
def channel_through_kernel(
    totals_ptr,  # fp32 [B, H_g, chunks, K]
    k_sums_ptr,  # fp32 [B, H_v, chunks, K]: of the sweep of v
    inner_ptr,  # bf16 or fp32 [B, H_v, chunks / SHORTEST + segments, 2, slices, BK BV]: S and D before intervals
    state_out_ptr,  # fp32 [B, H_v, K, V]: S leaving the run
    through_ptr,  # fp32 [B, H_v, chunks, K]: sums of the sweep of do, each replaced when it is taken
    places_ptr,  # int32 [segments, 7] if PACKED
    d_state_out_ptr,  # fp32 [B, H_v, K, V]: D leaving the run, or None for zero
    T,
    H_g,
    H_v,
    segments,
    segment_chunks,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    CHANNELS: tl.constexpr,  # that a program has
    BK: tl.constexpr,  # of the sweeps
    BV: tl.constexpr,
    C: tl.constexpr,
    FORGETS: tl.constexpr,  # what is less than rounding changes, base 2, see `beyond_one`
    FROM_ZERO: tl.constexpr,  # whether no run has an initial state
    ROUND: tl.constexpr,  # see `as_swept`
    SHORTEST: tl.constexpr,  # interval, in chunks: see `interval_of_channels`
    LONGEST: tl.constexpr,
    PACKED: tl.constexpr,
):
    here, _, k_first = sweep_place(places_ptr, segments, segment_chunks, T, H_v, K, CHANNELS, C, PACKED)
    first = here.first
    last = here.last
    channel = k_first + tl.arange(0, CHANNELS)
    gate_run, _ = gate_heads_of(here, T, H_g, H_v)
    totals_ptr += (gate_run * chunks + here.chunk) * K
    of_segment = (run_of(here, H_v) * chunks + here.chunk) * K
    k_sums_ptr += of_segment
    through_ptr += of_segment
    count = tl.cdiv(last - first, C)
    slice = k_first // BK
    interval = interval_of_channels(totals_ptr, count, slice * BK, K, BK, SHORTEST, LONGEST)
    # Where this program's rows of a tile are.
    size: tl.constexpr = (K + BK - 1) // BK * (BK * BV)
    inner_row: tl.constexpr = 2 * size
    rows = slice * (BK * BV) + (k_first - slice * BK) * BV
    run = run_of(here, H_v)
    first_state = first_interval(run, here.segment, here.chunk, segments, chunks, SHORTEST)
    begin, _ = run_bounds(places_ptr, T, PACKED)
    from_nothing = (first == begin) & FROM_ZERO
    to_nothing = here.ends & (d_state_out_ptr is None)
    carry = tl.zeros((CHANNELS,), tl.float32)
    if not here.ends:
        following = first_interval(run, here.segment + 1, here.chunk + count, segments, chunks, SHORTEST)
        carry = _paired(inner_ptr + following * inner_row + rows, size, CHANNELS, BV)
    elif d_state_out_ptr is not None:
        leaving = here.border * K * V
        pointers, mask = tile_at(state_out_ptr + leaving, channel_tile(k_first, 0, K, V), CHANNELS, BV)
        state = tl.load(pointers, mask=mask, other=0.0)
        pointers, mask = tile_at(d_state_out_ptr + leaving, channel_tile(k_first, 0, K, V), CHANNELS, BV)
        carry = tl.sum(state * as_swept(tl.load(pointers, mask=mask, other=0.0), ROUND), 1)
    for turn in range(tl.cdiv(count, interval)):
        begin, end = next_interval(turn, count, interval, True)
        # The first `walked` chunks are those that are followed to the interval's begin.
        walked = tl.zeros((CHANNELS,), tl.int32) + end
        later_sums = carry
        for step in range(begin, end):
            index = begin + end - 1 - step
            at = tl.cast(index, tl.int64) * K + channel
            total = tl.load(totals_ptr + at, mask=channel < K, other=0.0)
            q_sums = tl.load(through_ptr + at, mask=channel < K, other=0.0)
            k_sums = tl.load(k_sums_ptr + at, mask=channel < K, other=0.0)
            cut = ((index == 0) & from_nothing) | ((index == count - 1) & to_nothing)
            forgets = (beyond_one(total, tl.minimum(last - first - index * C, C)) < FORGETS) | cut
            # Through the chunk after one that forgets, unless that forgets too, or begins an interval: of what is known
            # to leave this one.
            after_it = forgets & (walked > index + 1) & (channel < K)
            tl.store(through_ptr + at + K, k_sums - later_sums, mask=after_it)
            later_sums = q_sums
            carry = tl.where(forgets, 0.0, carry - k_sums)
            walked = tl.where(forgets, index, walked)
            tl.store(through_ptr + at, carry, mask=channel < K)
            carry += q_sums
        known = _paired(
            inner_ptr + (first_state + begin // SHORTEST) * inner_row + rows, size, CHANNELS, BV
        )  # fmt: skip
        # Other threads read what these have stored.
        tl.debug_barrier()
        at = through_ptr + tl.cast(begin, tl.int64) * K + channel
        tl.store(at, known - later_sums, mask=(walked > begin) & (channel < K))
        _tie(through_ptr, carry - known, begin, walked, end, channel, K)
        carry = known


@triton.jit
def _paired(state_ptr, size, CHANNELS: tl.constexpr, BV: tl.constexpr):
    """S D summed over V, of the channels' rows of a tile, and of that `size` after it."""
    at = state_ptr + tl.arange(0, CHANNELS)[:, None] * BV + tl.arange(0, BV)[None, :]
    return tl.sum(tl.load(at).to(tl.float32) * tl.load(at + size).to(tl.float32), 1)


@triton.jit
def _tie(through_ptr, drift, begin, walked, end, channel, K: tl.constexpr):
    """Takes `drift`, what dg before an interval is off by, from what passes through its chunks up to `walked` but the
    first, in proportion."""
    for block in range(begin, end, AT_A_TIME):
        chunk = block + tl.arange(0, AT_A_TIME)[:, None]
        here = through_ptr + tl.cast(chunk, tl.int64) * K + channel
        mask = (chunk > begin) & (chunk < walked[None, :]) & (channel < K)
        share = (walked[None, :] - 0.5 - chunk.to(tl.float32)) / (walked[None, :] - begin)
        tl.store(here, tl.load(here, mask=mask, other=0.0) - share * drift[None, :], mask=mask)
