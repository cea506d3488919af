# mypy: ignore-errors
"""Decays inside a chunk, as base-2 logarithms that are never positive.

For token i of a chunk of `length` tokens, with per-token log-decays g:
    prefix_i  = g_0 + ... + g_i            from the chunk's start to i
    suffix_i  = g_{i+1} + ... + g_last     from i to the chunk's end
    total     = g_0 + ... + g_last
    added_i   = prefix_i - w_i             where tokens have weights exp(w_i): of what a token adds (WEIGHS)
    between(i, j) = g_{j+1} + ... + g_i    from j to i, for j <= i
Prefix and suffix are summed each on its own: the difference of two long sums would lose a small result.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import chunk_place

NONE = tl.constexpr(0)  # no decay
HEAD = tl.constexpr(1)  # a constant per head
TOKEN = tl.constexpr(2)  # a gate per head and token
CHANNEL = tl.constexpr(3)  # a gate per head, token and key channel

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# 2^-256 is zero in fp32; a finite floor keeps sums finite and their differences fine after a gate that forgets all.
MIN_LOG2 = tl.constexpr(-256.0)


@triton.jit
def floored_log2(g):
    """Natural log-decays as floored base-2 ones; NaN for what is none (positive, or NaN), and so for all that follows.

    That costs no launch and no wait, unlike looking at gates before they are used.
    """
    # No global: Triton compares those of a kernel between calls, and NaN is not equal to itself.
    return tl.where(g <= 0, tl.maximum(g * LOG2_E, MIN_LOG2), float("nan"))


@triton.jit
def log2_gate(ptr, mask):
    """Natural log-decays at ptr as floored base-2 ones; zero where not mask."""
    return floored_log2(tl.load(ptr, mask=mask, other=0.0).to(tl.float32))


@triton.jit
def head_gates(g_ptr, batch, head, T, H_v, KIND: tl.constexpr):
    """Pointer to the first gate of a batch and head, in g [H_v] or [B, T, H_v]."""
    if KIND == TOKEN:
        g_ptr += tl.cast(batch, tl.int64) * T * H_v
    return g_ptr + head


@triton.jit
def head_rate(g_ptr, KIND: tl.constexpr):
    """The base-2 log-decay per token of a head, whose gates begin at g_ptr; zero unless KIND is HEAD."""
    rate = 0.0
    if KIND == HEAD:
        rate = floored_log2(tl.load(g_ptr).to(tl.float32))
    return rate


@triton.jit
def constant_gates(rate, length, C: tl.constexpr):
    """prefix [C], suffix [C] and total of a chunk whose tokens all decay by `rate`."""
    i = tl.arange(0, C)
    return (i + 1) * rate, tl.maximum(length - 1 - i, 0) * rate, length * rate


@triton.jit
def beyond_one(total, length):
    """Return how much less passes a chunk of `length` tokens than one of them: its log-decay beyond the mean token's,
    zero for a single token."""
    return total * (1 - 1 / tl.maximum(length, 1))


@triton.jit
def decayed(state, log2, EXACT: tl.constexpr):
    """Return state 2^log2, of log-decays that broadcast to it.

    EXACT: a factor next to 1, rounded, is wrong by as much every time: over a million tokens by 1e-4. What is lost is
    taken off instead, which is exact to its own size.
    """
    if EXACT:
        x = log2 * LN_2
        # exp(x) - 1, which as a difference would have no digits.
        less = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
        return tl.where(x > -0.25, state + state * less, state * tl.exp2(log2))
    else:
        return state * tl.exp2(log2)


@triton.jit
def chunk_decays(
    prefix_ptr,
    suffix_ptr,
    at,
    rate,
    length,
    scale,
    KIND: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    WEIGHS: tl.constexpr = False,
):
    """prefix, added [C] and total of a chunk, which the sums of a gate per token have from `at` on; and, for a sweep,
    the decays of what a token reads from the state and of what it adds to it, [C] each, its weight in one of them."""
    if KIND == TOKEN:
        here = at + tl.arange(0, C)
        prefix = tl.load(prefix_ptr + here)
        total = tl.load(prefix_ptr + at + C - 1)
        added = tl.load(suffix_ptr + here) if WEIGHS else prefix
        # A difference does for inputs of 16 bits.
        suffix = tl.load(suffix_ptr + here) if EXACT else total - added
    else:
        prefix, suffix, total = constant_gates(rate, length, C)
        added = prefix
    from_start = tl.exp2(prefix) * scale
    to_end = tl.exp2(suffix)
    if REVERSE:
        from_state = to_end
        to_state = from_start
    else:
        from_state = from_start
        to_state = to_end
    return prefix, added, total, from_state, to_state


@triton.jit
def pair_decay(
    g_ptr,
    g_row,
    rate,
    prefix,
    added,
    length,
    KIND: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """[C, C] factors between row and column tokens: 2^between(column, row), zero for rows after columns.

    With REVERSE 2^between(row, column), zero for rows before columns. added: as `chunk_decays` gives it, so that
    factors have the earlier token's weight; else prefix.
    EXACT sums every pair's gates on their own instead of taking a difference of prefixes: for fp32 inputs, where
    a difference after a strong gate costs more than the bound.
    """
    row = tl.arange(0, C)[:, None]
    column = tl.arange(0, C)[None, :]
    distance = row - column if REVERSE else column - row
    reached = distance >= 0
    if KIND == NONE:
        return tl.where(reached, 1.0, 0.0)
    else:
        if KIND == HEAD:
            log2 = distance * rate
        elif EXACT:
            i = tl.arange(0, C)
            gates = log2_gate(g_ptr + i * g_row, i < length)
            if REVERSE:
                log2 = tl.cumsum(tl.where(row > column, gates[:, None], 0.0), 0)
            else:
                log2 = tl.cumsum(tl.where(column > row, gates[None, :], 0.0), 1)
        elif REVERSE:
            log2 = prefix[:, None] - added[None, :]
        else:
            log2 = prefix[None, :] - added[:, None]
        # Of unreached pairs it may be infinite: it is replaced, not multiplied.
        return tl.where(reached, tl.exp2(log2), 0.0)


@triton.jit(do_not_specialize=["T", "H_v", "chunks"])
def gate_sums_kernel(
    g_ptr,  # [B, T, H_v]
    prefix_ptr,  # fp32 [B, H_v, chunks C], written, also past a chunk's end, so that it is loaded without a mask
    suffix_ptr,  # likewise: suffix if EXACT, added if there are weights
    places_ptr,  # int32 [chunks, 4] if PACKED
    weight_ptr,  # [B, T, H_v], natural logarithms of weights, or None
    T,
    H_v,
    chunks,
    C: tl.constexpr,
    HEADS: tl.constexpr,  # that a program has
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The sums of gates per token that all other kernels read: a scan in each of their chunks would make them wait."""
    chunk = tl.program_id(0)
    first, last = chunk_place(places_ptr, chunk, T, C, PACKED)
    groups = tl.cdiv(H_v, HEADS)
    batch = tl.cast(tl.program_id(1) // groups, tl.int64)
    head = tl.program_id(1) % groups * HEADS + tl.arange(0, HEADS)[None, :]
    i = tl.arange(0, C)[:, None]
    place = (batch * T + first + i) * H_v + head
    gates = g_ptr + place
    inside = (first + i < last) & (head < H_v)
    sums = ((batch * H_v + head) * chunks + chunk) * C + i
    prefix = tl.cumsum(log2_gate(gates, inside), 0)
    tl.store(prefix_ptr + sums, prefix, mask=head < H_v)
    if EXACT:
        tl.static_assert(weight_ptr is None)
        later = log2_gate(gates + H_v, (first + i + 1 < last) & (head < H_v))
        tl.store(suffix_ptr + sums, tl.cumsum(later, 0, reverse=True), mask=head < H_v)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        tl.store(suffix_ptr + sums, prefix - weight, mask=head < H_v)
