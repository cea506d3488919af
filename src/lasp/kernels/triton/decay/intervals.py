# mypy: ignore-errors
"""Intervals: so many chunks of a segment, before which a decay's gradient is known, from <S, D>.

S, the state, and D, its gradient, come by there in sweeps of two directions, which leave them as tiles of their own, as
they read them: in bf16 rounded. From there on the gradient is followed by what chunks add to it, in which rounding
gathers. Shorter intervals gather less, but at each a sweep starts anew, and states are written and read.
"""

import torch
import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import TOKEN

# Chunks, at least and at most. What fp32 inputs keep is worth the least; fp16 reads states in two parts.
INTERVALS = {torch.bfloat16: (4, 32), torch.float16: (32, 32), torch.float32: (4, 4)}
# bf16's are the shorter the more a chunk forgets: sums of the gradient over tokens are then smaller. Log-decays of the
# strongest chunk, base 2, beyond which they are half of the longest, or the shortest; beyond the last nothing passes a
# chunk (launches.FORGETS), so there is nothing to follow.
HALVED_LOG2 = tl.constexpr(-0.3)
SHORTEST_LOG2 = tl.constexpr(-1.3)
NOTHING_LOG2 = tl.constexpr(-9.2)
TOTALS = tl.constexpr(64)  # of chunks, read at a time


@triton.jit
def interval_of(
    prefix_ptr, rate, chunks, C: tl.constexpr, KIND: tl.constexpr, SHORTEST: tl.constexpr, LONGEST: tl.constexpr
):
    """Chunks of an interval of a segment of so many, whose gates' sums begin at prefix_ptr: the same to whoever asks,
    since a least number does not depend on the order."""
    if SHORTEST == LONGEST:
        return LONGEST
    else:
        strongest = of_passed(rate * C)
        if KIND == TOKEN:
            for first in range(0, chunks, TOTALS):
                chunk = first + tl.arange(0, TOTALS)
                totals = tl.load(prefix_ptr + chunk * C + C - 1, mask=chunk < chunks, other=0.0)
                strongest = tl.minimum(strongest, tl.min(of_passed(totals), 0))
        return interval_of_strongest(strongest, SHORTEST, LONGEST)


@triton.jit
def of_passed(log2):
    """Log-decays of chunks that states pass; zero for others."""
    return tl.where(log2 < NOTHING_LOG2, 0.0, log2)


@triton.jit
def interval_of_strongest(log2, SHORTEST: tl.constexpr, LONGEST: tl.constexpr):
    """The same, of the log-decay of the segment's strongest chunk."""
    interval = tl.where(log2 < HALVED_LOG2, LONGEST // 2, LONGEST)
    return tl.where(log2 < SHORTEST_LOG2, SHORTEST, interval)


@triton.jit
def next_interval(turn, chunks, interval, REVERSE: tl.constexpr):
    """The interval that a sweep walks next: its first chunk and the one after its last."""
    begin = (tl.cdiv(chunks, interval) - 1 - turn if REVERSE else turn) * interval
    return begin, tl.minimum(begin + interval, chunks)


@triton.jit
def first_interval(run, segment, chunk, segments, chunks, SHORTEST: tl.constexpr):
    """The place of the state before a segment that begins with `chunk` among those of all runs,
    [runs, chunks / SHORTEST + segments, 2], each beside its gradient: a segment has one for each of the shortest
    intervals that it may have."""
    return run * (tl.cdiv(chunks, SHORTEST) + segments) + chunk // SHORTEST + segment


@triton.jit
def leave(inner_ptr, state):
    """Stores a program's tile of a state, its elements in a row."""
    R: tl.constexpr = state.shape[0]
    S: tl.constexpr = state.shape[1]
    at = tl.arange(0, R)[:, None] * S + tl.arange(0, S)[None, :]
    tl.store(inner_ptr + at, state.to(inner_ptr.dtype.element_ty))
