# mypy: ignore-errors
"""A chunk's scalars and writes, as every sweep of the delta rule has them.

Letters, per chunk: S [K, V] enters, D is the gradient of what leaves. 2^prefix decays from the chunk's start to a
token, 2^suffix from a token to its end, 2^total over all of it; G_ij = 2^between(j, i) from token j to a later i.

    L = strict(k k^T G),  A = (I + diag(beta) L)^-1            solve
    W = v - 2^prefix (k S),  u = A diag(beta) W                what each token writes
    o = scale 2^prefix (q S) + P u,  P = scale tril(q k^T G)
    S' = 2^total S + (2^suffix k)^T u

beta is at least 2^-50: a token whose beta is zero then writes 1e-15 of what it would, and its u / beta is known.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import CHANNEL, TOKEN, pair_decay
from lasp.kernels.triton.common.program import run_of, state_tile

BLOCK = tl.constexpr(16)  # tokens of the blocks that `solve` takes
MIN_BETA = tl.constexpr(2.0**-50)
# A decay in bits of which fp32 keeps nothing, and chunks whose decays are looked at together.
FORGOTTEN, SPAN = tl.constexpr(-151.0), tl.constexpr(128)


@triton.jit
def token_sums(prefix_ptr, suffix_ptr, at, KIND: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr):
    """prefix [C], suffix [C] and total of the chunk whose sums of gates begin at `at`; zero unless KIND is TOKEN."""
    if KIND == TOKEN:
        prefix = tl.load(prefix_ptr + at + tl.arange(0, C))
        total = tl.load(prefix_ptr + at + C - 1)
        # A difference does for operands of 16 bits.
        suffix = tl.load(suffix_ptr + at + tl.arange(0, C)) if EXACT else total - prefix
    else:
        prefix = tl.zeros((C,), tl.float32)
        suffix = tl.zeros((C,), tl.float32)
        total = 0.0
    return prefix, suffix, total


@triton.jit
def chunks_reached(bounds_ptr, at, count, REVERSE: tl.constexpr):
    """Count those of a segment's `count` chunks, its last (REVERSE: first), of which its end (start) knows anything.

    bounds_ptr: fp32, from `at` on log2 of what passes each chunk at most. NaN among them: all chunks, which hand
    it on.
    """
    n = tl.arange(0, SPAN)
    passed = 0.0
    reached = 1
    for first in range(0, count, SPAN):
        chunk = first + n
        place = chunk if REVERSE else count - 1 - chunk
        bounds = tl.load(bounds_ptr + at + place, mask=chunk < count, other=0.0)
        before = passed + tl.cumsum(bounds, 0) - bounds
        reached = tl.maximum(reached, tl.max(tl.where((chunk < count) & (before >= FORGOTTEN), chunk + 1, 0)))
        passed += tl.sum(bounds)
    return tl.where(passed == passed, tl.minimum(reached, count), count)


@triton.jit
def lengths(norms_ptr, at, C: tl.constexpr, NORMALIZE: tl.constexpr):
    """Factors that normalise the chunk's keys or queries, [C]."""
    if NORMALIZE:
        return tl.load(norms_ptr + at + tl.arange(0, C))
    else:
        return tl.full((C,), 1.0, tl.float32)


@triton.jit
def state_decay(totals_ptr, chunk, total, K: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr):
    """The factors by which a chunk multiplies the channels of a state, [BK]; totals_ptr: [chunks, K] of the head."""
    if KIND == CHANNEL:
        d = tl.arange(0, BK)
        return tl.exp2(tl.load(totals_ptr + tl.cast(chunk, tl.int64) * K + d, mask=d < K, other=0.0))
    else:
        return tl.full((BK,), 1.0, tl.float32) * tl.exp2(total)


@triton.jit
def entering_state(
    entering_ptr, here, H_v, segments, column, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """[BV, BK] of a transposed state: columns of what enters the program's segment or, if WHOLE, its run.

    entering_ptr: fp32 [B, H_v, segments, K, V], if WHOLE [B or documents, H_v, K, V]; None for zero.
    """
    if entering_ptr is None:
        return tl.zeros((BV, BK), tl.float32)
    else:
        source = here.border if WHOLE else run_of(here, H_v) * segments + here.segment
        entering, mask = state_tile(entering_ptr + source * K * V, column, 0, V, K, 1, V, BV, BK)
        return tl.load(entering, mask=mask, other=0.0)


@triton.jit
def between(
    g_ptr, H_v, prefix, start, last, KIND: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr
):
    """[C, C] factors between tokens, as in `pair_decay`; g_ptr: the head's gates."""
    if EXACT and KIND == TOKEN:
        at = g_ptr + tl.cast(start, tl.int64) * H_v
        return pair_decay(at, H_v, 0.0, prefix, prefix, last - start, KIND, C, REVERSE, EXACT)
    else:
        i, j = token_pairs(C)
        reached = i >= j if REVERSE else i <= j
        if KIND == TOKEN:
            log2 = prefix[:, None] - prefix[None, :] if REVERSE else prefix[None, :] - prefix[:, None]
            # Of unreached pairs it may be infinite: it is replaced, not multiplied.
            return tl.where(reached, tl.exp2(log2), 0.0)
        else:
            return tl.where(reached, 1.0, 0.0)


@triton.jit
def token_pairs(C: tl.constexpr):
    """Rows [C, 1] and columns [1, C] of a matrix between a chunk's tokens."""
    return tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]


@triton.jit
def written(state, keys_t, v_t, beta, read_decay, inverse, PRECISION: tl.constexpr):
    """The writes of the chunk's tokens, transposed, [BV, C] in fp32.

    Args:
        state: [BV, BK], transposed. keys_t: [BK, C]. v_t: [BV, C] in fp32.
        beta, read_decay: [C]. inverse: A - I, [C, C].
    """
    dtype = inverse.dtype
    read = tl.dot(state.to(dtype), keys_t, input_precision=PRECISION)
    w = v_t * beta[None, :] - read * (beta * read_decay)[None, :]
    return tl.dot(w.to(dtype), tl.trans(inverse), w, input_precision=PRECISION)


@triton.jit
def after_chunk(state, u_t, keys, to_end, decay, PRECISION: tl.constexpr):
    """The transposed state [BV, BK] after a chunk that writes u_t [BV, C] at keys [C, BK].

    u is rounded before it decays, so that the backward pass, from a stored u, makes the same states bit by bit.
    """
    dtype = keys.dtype
    weighted = (u_t.to(dtype).to(tl.float32) * to_end[None, :]).to(dtype)
    return tl.dot(weighted, keys, state * decay[None, :], input_precision=PRECISION)


@triton.jit
def placed_rows(ptr, start, last, row, r, BK: tl.constexpr, C: tl.constexpr, SPREAD: tl.constexpr):
    """Pointers [.., BK] and mask of rows r of a state's transpose in the place of a chunk's gradient, which begins at
    `ptr` with `row` elements from one token to the next.

    Row r lies in that of token r % C, each C channels where their own gradient will be: the program that writes that
    has read them, and no other does. SPREAD: how many elements of a state one of the gradient is long.
    """
    token = start + r % C
    d = tl.arange(0, BK)[None, :]
    return ptr + tl.cast(token, tl.int64) * row + (d // C * (C * SPREAD) + d % C), (token < last) & (d >= 0)
