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


@triton.jit
def chunk_decay(g_ptr, g_row, head_log2, length, KIND: tl.constexpr, C: tl.constexpr):
    """prefix [C], suffix [C], total, for a chunk whose gates start at g_ptr (KIND TOKEN) or decay by head_log2."""
    i = tl.arange(0, C)
    if KIND == TOKEN:
        prefix = tl.cumsum(tl.load(g_ptr + i * g_row, mask=i < length, other=0.0) * LOG2_E, 0)
        later = tl.load(g_ptr + (i + 1) * g_row, mask=i + 1 < length, other=0.0) * LOG2_E
        suffix = tl.cumsum(later, 0, reverse=True)
        total = tl.sum(later, 0) + tl.load(g_ptr) * LOG2_E
    else:
        prefix = (i + 1) * head_log2
        suffix = tl.maximum(length - 1 - i, 0) * head_log2
        total = length * head_log2
    return prefix, suffix, total


@triton.jit
def causal_decay(
    g_ptr, g_row, head_log2, prefix, length, KIND: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr
):
    """[C, C] factors 2^between(i, j): row i, column j <= i; with REVERSE row j, column i >= j. Zero elsewhere.

    EXACT sums every pair's gates on their own instead of taking a difference of prefixes: for fp32 inputs, where
    a difference after a strong gate would cost more than the bound.
    """
    r = tl.arange(0, C)[:, None]
    c = tl.arange(0, C)[None, :]
    if REVERSE:
        keep = c >= r
        distance = c - r
    else:
        keep = r >= c
        distance = r - c
    if KIND == NONE:
        return tl.where(keep, 1.0, 0.0)
    else:
        if KIND == HEAD:
            log2 = distance * head_log2
        elif EXACT:
            i = tl.arange(0, C)
            gates = tl.load(g_ptr + i * g_row, mask=i < length, other=0.0) * LOG2_E
            if REVERSE:
                log2 = tl.cumsum(tl.where(c > r, gates[None, :], 0.0), 1)
            else:
                log2 = tl.cumsum(tl.where(r > c, gates[:, None], 0.0), 0)
        elif REVERSE:
            log2 = prefix[None, :] - prefix[:, None]
        else:
            log2 = prefix[:, None] - prefix[None, :]
        return tl.where(keep, tl.exp2(log2), 0.0)
