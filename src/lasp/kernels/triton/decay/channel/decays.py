# mypy: ignore-errors
"""Decays of a gate per key channel: sums of gates over intervals of a chunk, taken as matrix products.

A sum over any interval of tokens is a product with a matrix of zeros and ones, so every decay a kernel needs comes
from the chunk's gates [C, BK] directly, by tensor cores, with no scan and no difference of long sums. For 16-bit
inputs the gates enter in fp16, exact to 2^-12 of each: a decay 2^-x is then wrong by at most x 2^-x 2^-12 log 2 <
1.3e-4, far less than operands in bf16 are.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import floored_log2
from lasp.kernels.triton.common.program import DESCRIPTORS, StateTile, load_chunk, segment_state, tile_at

MIN_BASE_LOG2 = tl.constexpr(-13.5)
# Operands divided by such a decay are inside bf16's range up to 2^27; products of gradients and these inside fp32's.
MAX_TO_MIDDLE_LOG2 = tl.constexpr(100.0)
# And so where the mean gate of a few tokens is no stronger: in sums of bf16 in two parts 2^-11 is left of what crosses.
MIN_MEAN_LOG2 = tl.constexpr(-6.0)


@triton.jit
def load_channel_gates(
    source, first, last, column, T, row, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """[C, BN] floored base-2 log-decays; zero for tokens from `last` on."""
    g = load_chunk(source, first, column, T, row, N, C, BN, DESCRIPTORS)
    return tl.where((first + tl.arange(0, C) < last)[:, None], floored_log2(g.to(tl.float32)), 0.0)


@triton.jit
def gate_operand(gates, dtype: tl.constexpr):
    """Gates as products of inputs of `dtype` take them."""
    return gates if dtype == tl.float32 else gates.to(tl.float16)


@triton.jit
def sum_over(interval, gates):
    """interval [C, C] (which tokens each row sums over) times gates [C, BK], as `gate_operand` gives them, in fp32."""
    return tl.dot(interval.to(gates.dtype), gates, input_precision="ieee")


@triton.jit
def prefix_sums(gates, C: tl.constexpr):
    """[C, BK]: from the chunk's start to each token, its own included."""
    i = tl.arange(0, C)
    return sum_over(i[:, None] >= i[None, :], gates)


@triton.jit
def suffix_sums(gates, C: tl.constexpr):
    """[C, BK]: from each token, its own excluded, to the chunk's end."""
    i = tl.arange(0, C)
    return sum_over(i[:, None] < i[None, :], gates)


@triton.jit
def ends_chunk(first, last, C: tl.constexpr):
    """[C, 1]: whether a token is the last of its chunk."""
    i = tl.arange(0, C)[:, None]
    return (i == C - 1) | (first + i == last - 1)


@triton.jit
def sums_to_end(terms, dtype: tl.constexpr, C: tl.constexpr):
    """[C, BK]: each token's term and those of all later tokens of the chunk."""
    if dtype == tl.bfloat16:
        i = tl.arange(0, C)
        return _sum_over_terms(i[:, None] <= i[None, :], terms)
    else:
        # Terms, unlike gates, may exceed fp16.
        return tl.cumsum(terms, 0, reverse=True)


@triton.jit
def sums_before(terms, dtype: tl.constexpr, C: tl.constexpr):
    """[C, BK]: the terms of all earlier tokens of the chunk."""
    if dtype == tl.bfloat16:
        i = tl.arange(0, C)
        return _sum_over_terms(i[:, None] > i[None, :], terms)
    else:
        return tl.cumsum(terms, 0) - terms


@triton.jit
def _sum_over_terms(interval, terms):
    """interval [C, C] times terms in two parts, each as products of bf16 take it."""
    high = terms.to(tl.bfloat16)
    low = (terms - high.to(tl.float32)).to(tl.bfloat16)
    interval = interval.to(tl.bfloat16)
    return tl.dot(interval, low, tl.dot(interval, high))


@triton.jit
def load_intervals(intervals_ptr, level, C: tl.constexpr):
    """The [C, C] matrix of a level: row i sums the gates between token i and the middle of its block.

    Level -1 is that of the base blocks, -2 that of the whole chunk: there sums of tokens before the middle count
    negative.

    It is read, not computed: integer arithmetic on [C, C] would cost more than the level's products.
    """
    return tl.load(intervals_ptr + (level + 2) * C * C + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :])


@triton.jit
def sums_to_middle(intervals_ptr, operand, C: tl.constexpr):
    """[C, BK]: of gates from the chunk's middle to each token, negative for tokens before it."""
    return sum_over(load_intervals(intervals_ptr, -2, C), operand)


@triton.jit
def base_operand(gates, dtype: tl.constexpr):
    """Gates within base blocks, for `load_intervals` of level -1.

    There, decays from the middle are up to 2^(2^(BASE - 1) |gate|), 2^108 in blocks of 16 tokens with a floor of -13.5:
    inside bf16's range for operands up to 2^19. What a stronger gate should forget counts 8.6e-5, a twentieth of bf16's
    rounding, among the nearest 15 tokens.
    """
    return gate_operand(tl.maximum(gates, MIN_BASE_LOG2), dtype)


@triton.jit
def in_base_block(BASE: tl.constexpr, C: tl.constexpr):
    """[C, C]: the pairs within one base block."""
    block = tl.arange(0, C) >> BASE
    return block[:, None] == block[None, :]


@triton.jit
def is_done(unbounded_ptr, chunk, UNBOUNDED: tl.constexpr):
    """True if a kernel for bounded chunks has done a chunk: if UNBOUNDED, where it did not mark it."""
    if UNBOUNDED:
        return tl.load(unbounded_ptr + chunk) == 0
    else:
        return False


@triton.jit
def is_late(level, C: tl.constexpr):
    """[C, 1]: whether a token is in the late half of its block of 2^(level + 1) tokens."""
    return ((tl.arange(0, C)[:, None] >> level) & 1) == 1


@triton.jit
def meets(level, C: tl.constexpr):
    """[C, C]: the pairs that meet at a level, one early, one late in the same block; symmetric."""
    half = tl.arange(0, C) >> level
    return (half[:, None] ^ half[None, :]) == 1


@triton.jit
def crosses(level, C: tl.constexpr):
    """[C, C]: whose pairs at a level cross a token: of a late one those of itself and later ones of its half block, of
    an early one those of earlier ones of its half."""
    i = tl.arange(0, C)
    token = i[:, None]
    other = i[None, :]
    beyond = tl.where(((token >> level) & 1) == 1, other >= token, other < token)
    return (token >> level == other >> level) & beyond


@triton.jit
def channel_tile(k_first, v_first, K: tl.constexpr, V: tl.constexpr):
    """The `StateTile` [BK, BV] that the sweeps hold."""
    return StateTile(r_first=k_first, s_first=v_first, R=K, S=V, row=V, column=1)


@triton.jit
def segment_border(states_ptr, decays_ptr, outside_ptr, index, border, tile, BK: tl.constexpr, BV: tl.constexpr,
                   WHOLE: tl.constexpr):  # fmt: skip
    """The state at a segment's border, from zero, with what comes from beyond the run if that is not None, decayed to
    the segment by channel. If WHOLE the segment is the run. And where it stands, with a mask.

    index: of the segment's state and decays; border: of the run's; tile: from `channel_tile`.
    """
    pointers, mask = tile_at(states_ptr + index * tile.R * tile.S, tile, BK, BV)
    state = segment_state(pointers, mask, WHOLE)
    if outside_ptr is not None:
        outside, _ = tile_at(outside_ptr + border * tile.R * tile.S, tile, BK, BV)
        beyond = tl.load(outside, mask=mask, other=0.0)
        if not WHOLE:
            channel = tile.r_first + tl.arange(0, BK)
            decay = tl.load(decays_ptr + index * tile.R + channel, mask=channel < tile.R, other=0.0)
            beyond *= tl.exp2(decay)[:, None]
        state += beyond
    return state, pointers, mask


@triton.jit
def load_sum(at, first, column, last, H_g, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """[C, BK] of [B, T, H_v, K], summed over the GROUP value heads that share a gate, the first of them at `at`."""
    x = load_chunk(at, first, column, last, H_g * GROUP * K, K, C, BK, DESCRIPTORS)
    if GROUP > 1:
        x = x.to(tl.float32)
    for other in tl.static_range(1, GROUP):
        x += load_chunk(at + other * K, first, column, last, H_g * GROUP * K, K, C, BK, DESCRIPTORS)
    return x


@triton.jit
def load_through(through_ptr, run, chunks, channel, K: tl.constexpr, GROUP: tl.constexpr):
    """Load likewise [BK] of fp32 [B, H_v, chunks, K], of a program's chunk."""
    total = tl.zeros_like(channel).to(tl.float32)
    for each in tl.static_range(GROUP):
        here = ((run * GROUP + each) * chunks + tl.program_id(1)) * K + channel
        total += tl.load(through_ptr + here, mask=channel < K, other=0.0)
    return total


@triton.jit
def gate_heads_of(here, T, H_g, H_v):
    """Find the run [B, H_g] whose gates a program of value heads takes, and its first row in [B, T, H_g]."""
    batch = tl.cast(here.batch, tl.int64)
    head = here.head // (H_v // H_g)
    return batch * H_g + head, batch * T * H_g + head
