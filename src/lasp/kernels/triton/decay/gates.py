"""Decays inside a chunk, as base-2 logarithms that are never positive.

For token i of a chunk of `length` tokens, with per-token log-decays g:
    prefix_i  = g_0 + ... + g_i            from the chunk's start to i
    suffix_i  = g_{i+1} + ... + g_last     from i to the chunk's end
    total     = g_0 + ... + g_last
    between(i, j) = g_{j+1} + ... + g_i    from j to i, for j <= i
Prefix and suffix are summed each on its own: the difference of two long sums would lose a small result.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(0)  # no decay
HEAD = tl.constexpr(1)  # a constant per head
TOKEN = tl.constexpr(2)  # a gate per head and token
CHANNEL = tl.constexpr(3)  # a gate per head, token and key channel

LOG2_E = tl.constexpr(1.4426950408889634)
# 2^-256 is zero in fp32; a finite floor keeps sums finite and their differences fine after a gate that forgets all.
MIN_LOG2 = tl.constexpr(-256.0)


@triton.jit
def log2_gate(ptr, mask):
    """Natural log-decays at ptr as floored base-2 ones; zero where not mask."""
    return tl.maximum(tl.load(ptr, mask=mask, other=0.0).to(tl.float32) * LOG2_E, MIN_LOG2)


@triton.jit
def head_rate(g_ptr, head, KIND: tl.constexpr):
    """The base-2 log-decay per token of a head; zero unless KIND is HEAD."""
    rate = 0.0
    if KIND == HEAD:
        rate = tl.maximum(tl.load(g_ptr + head).to(tl.float32) * LOG2_E, MIN_LOG2)
    return rate


@triton.jit
def chunk_decay(g_ptr, g_row, rate, length, KIND: tl.constexpr, C: tl.constexpr):
    """prefix [C], suffix [C] and total of the chunk whose gates start at g_ptr (TOKEN) or are `rate` (HEAD)."""
    i = tl.arange(0, C)
    if KIND == TOKEN:
        gates = log2_gate(g_ptr + i * g_row, i < length)
        prefix = tl.cumsum(gates, 0)
        suffix = tl.cumsum(log2_gate(g_ptr + (i + 1) * g_row, i + 1 < length), 0, reverse=True)
        total = tl.sum(gates, 0)
    else:
        prefix = (i + 1) * rate
        suffix = tl.maximum(length - 1 - i, 0) * rate
        total = length * rate
    return prefix, suffix, total


@triton.jit
def pair_decay(
    g_ptr, g_row, rate, prefix, length, KIND: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr
):
    """[C, C] factors 2^between(i, j): row i, column j <= i; with REVERSE row j, column i >= j. Zero elsewhere.

    EXACT sums every pair's gates on their own instead of taking a difference of prefixes: for fp32 inputs, where
    a difference after a strong gate costs more than the bound.
    """
    r = tl.arange(0, C)[:, None]
    c = tl.arange(0, C)[None, :]
    distance = c - r if REVERSE else r - c
    keep = distance >= 0
    if KIND == NONE:
        return tl.where(keep, 1.0, 0.0)
    else:
        if KIND == HEAD:
            log2 = distance * rate
        elif EXACT:
            i = tl.arange(0, C)
            gates = log2_gate(g_ptr + i * g_row, i < length)
            if REVERSE:
                log2 = tl.cumsum(tl.where(c > r, gates[None, :], 0.0), 1)
            else:
                log2 = tl.cumsum(tl.where(r > c, gates[:, None], 0.0), 0)
        elif REVERSE:
            log2 = prefix[None, :] - prefix[:, None]
        else:
            log2 = prefix[:, None] - prefix[None, :]
        return tl.where(keep, tl.exp2(tl.where(keep, log2, 0.0)), 0.0)
