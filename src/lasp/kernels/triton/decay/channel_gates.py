"""Decays of a gate per key channel: sums of gates over stretches of a chunk, taken as matrix products.

A sum over any stretch of tokens is a product with a matrix of zeros and ones, so every decay a kernel needs comes
from the chunk's gates [C, BK] directly, by tensor cores, with no scan and no difference of long sums. For 16-bit
inputs the gates enter as a sum of two 16-bit parts, exact to 2^-16 of each gate: a decay 2^-x is then wrong by at most
x 2^-x 2^-16.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_chunk
from lasp.kernels.triton.decay.gates import floored_log2


@triton.jit
def load_channel_gates(
    source, first, last, column, T, row, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """[C, BN] floored base-2 log-decays; zero for tokens from `last` on."""
    g = load_chunk(source, first, column, T, row, N, C, BN, DESCRIPTORS)
    return tl.where((first + tl.arange(0, C) < last)[:, None], floored_log2(g.to(tl.float32)), 0.0)


@triton.jit
def sum_over(stretch, gates, dtype: tl.constexpr):
    """stretch [C, C] (which tokens each row sums over) times gates [C, BK], in fp32."""
    if dtype == tl.float32:
        return tl.dot(stretch.to(tl.float32), gates, input_precision="ieee")
    else:
        ones = stretch.to(dtype)
        high = gates.to(dtype)
        low = (gates - high.to(tl.float32)).to(dtype)
        return tl.dot(ones, low, tl.dot(ones, high))


@triton.jit
def prefix_sums(gates, dtype: tl.constexpr, C: tl.constexpr):
    """[C, BK]: from the chunk's start to each token, its own included."""
    i = tl.arange(0, C)
    return sum_over(i[:, None] >= i[None, :], gates, dtype)


@triton.jit
def suffix_sums(gates, dtype: tl.constexpr, C: tl.constexpr):
    """[C, BK]: from each token, its own excluded, to the chunk's end."""
    i = tl.arange(0, C)
    return sum_over(i[:, None] < i[None, :], gates, dtype)


@triton.jit
def sums_to_end(terms, dtype: tl.constexpr, C: tl.constexpr):
    """[C, BK]: each token's term and those of all later tokens of the chunk."""
    if dtype == tl.bfloat16:
        i = tl.arange(0, C)
        return sum_over(i[:, None] <= i[None, :], terms, dtype)
    else:
        # Terms, unlike gates, may exceed fp16.
        return tl.cumsum(terms, 0, reverse=True)


@triton.jit
def load_stretches(stretches_ptr, level, C: tl.constexpr):
    """The [C, C] matrix of a level: row i sums the gates between token i and the middle of its block.

    It is read, not computed: integer arithmetic on [C, C] would cost more than the level's products.
    """
    return tl.load(stretches_ptr + level * C * C + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :])


@triton.jit
def is_late(level, C: tl.constexpr):
    """[C, 1]: whether a token is in the late half of its block of 2^(level + 1) tokens."""
    return ((tl.arange(0, C)[:, None] >> level) & 1) == 1


@triton.jit
def meets(level, C: tl.constexpr):
    """[C, C]: the pairs that meet at a level, one early, one late in the same block; symmetric."""
    return ((tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]) >> level) == 1


@triton.jit
def meeting_decay(gates_high, gates_low, stretches, dtype: tl.constexpr):
    """[C, BK]: each token's decay to or from the middle of its block of 2^(level + 1) tokens; see channel_prepare."""
    if dtype == tl.float32:
        return tl.exp2(tl.dot(stretches, gates_high, input_precision="ieee"))
    else:
        return tl.exp2(tl.dot(stretches, gates_low, tl.dot(stretches, gates_high)))


@triton.jit
def split_gates(gates, dtype: tl.constexpr):
    """The two parts of `dtype` that gates enter products as (fp32: themselves, and nothing)."""
    high = gates.to(dtype)
    return high, (gates - high.to(tl.float32)).to(dtype)
