# mypy: ignore-errors
"""The part of a decay's gradient that crosses a token within its chunk, where it is not a difference of sweeps' sums.

    sum_{i >= t > j} w_ij,  w_ij = scale 2^between(j, i) (q_i . k_j) (do_i . v_j)        (see `gate_gradient`)

of chunks that forget what was before them, and for fp32 inputs of all. Of these, where a chunk and both beside it let
next to nothing pass, what does is formed too, of the pairs of both: as a difference of sums it would have no digits.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import TOKEN, beyond_one, head_gates, head_rate, log2_gate, pair_decay
from lasp.kernels.triton.common.program import DESCRIPTORS, begins_run, chunk_place, load_chunk

# Base 2: what then passes two chunks is as little to what passes one, as that is to what passes none.
NEAR_LOG2 = tl.constexpr(-12.0)


@triton.jit(do_not_specialize=["scale", "T", "rows", "H", "H_v", "chunks"])
def gate_pairs_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    g_ptr,  # [H_v] or [B, T, H_v]
    prefix_ptr,  # fp32 [B, H_v, chunks C] or unused
    suffix_ptr,  # likewise: added, if WEIGHS
    dg_ptr,  # fp32 [B, T, H_v], written where pairs are formed
    places_ptr,  # int32 [chunks, 4] if PACKED
    scale,
    T,
    rows,  # B H_v
    H,
    H_v,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # columns of q and k at a time
    BV: tl.constexpr,  # and of v and do
    C: tl.constexpr,
    KIND: tl.constexpr,
    FORGETS: tl.constexpr,  # as in `gate_gradient`
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    """A program for each chunk of each head: all of them at once, where a program for many would wait for each."""
    chunk = tl.program_id(0) // rows
    run = tl.cast(tl.program_id(0) % rows, tl.int64)
    batch = run // H_v
    head = run % H_v
    first, last = chunk_place(places_ptr, chunk, T, C, PACKED)
    g_ptr = head_gates(g_ptr, batch, head, T, H_v, KIND)
    prefix_ptr += (run * chunks + chunk) * C
    rate = head_rate(g_ptr, KIND)
    length = last - first
    total = length * rate
    if KIND == TOKEN:
        total = tl.load(prefix_ptr + C - 1)
    if EXACT or beyond_one(total, length) < FORGETS:
        qk = batch * T * H + head // (H_v // H)
        vo = batch * T * H_v + head
        # Under way while scores are formed.
        do = load_chunk(do_ptr + vo * V, first, 0, last, H_v * V, V, C, BV, DESCRIPTORS)
        v = load_chunk(v_ptr + vo * V, first, 0, last, H_v * V, V, C, BV, DESCRIPTORS)
        scores = _products(q_ptr + qk * K, k_ptr + qk * K, first, last, first, last, H * K, K, C, BK, PRECISION)
        d_scores = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        for column in range(BV, V, BV):
            do = load_chunk(do_ptr + vo * V, first, column, last, H_v * V, V, C, BV, DESCRIPTORS)
            v = load_chunk(v_ptr + vo * V, first, column, last, H_v * V, V, C, BV, DESCRIPTORS)
            d_scores = tl.dot(do, tl.trans(v), d_scores, input_precision=PRECISION)
        t = tl.arange(0, C)
        prefix = tl.zeros((C,), tl.float32)
        if KIND == TOKEN:
            prefix = tl.load(prefix_ptr + t)
        added = prefix
        if WEIGHS:
            added = tl.load(suffix_ptr + (run * chunks + chunk) * C + t)
        g_chunk = g_ptr + tl.cast(first, tl.int64) * H_v
        w = scores * d_scores * pair_decay(g_chunk, H_v, rate, prefix, added, length, KIND, C, True, EXACT)
        w = tl.where(t[:, None] > t[None, :], w, 0.0)
        if EXACT:
            # [t, j]: what reads j from t on.
            later = tl.cumsum(w, 0, reverse=True)
            crossing = tl.sum(tl.where(t[:, None] > t[None, :], later, 0.0), 1) * scale
            near = _is_near(places_ptr, prefix_ptr, rate, total, chunk, chunks, T, C, KIND, PACKED)
            passing = tl.zeros((C, C), tl.float32)
            if near:
                after, end = chunk_place(places_ptr, chunk + 1, T, C, PACKED)
                passing = _products(
                    q_ptr + qk * K, k_ptr + qk * K, after, end, first - C, first, H * K, K, C, BK, PRECISION
                )  # fmt: skip
                passing *= _products(
                    do_ptr + vo * V, v_ptr + vo * V, after, end, first - C, first, H_v * V, V, C, BV, PRECISION
                )  # fmt: skip
                to_end = (C - 1 - t) * rate
                from_start = (t + 1) * rate
                if KIND == TOKEN:
                    to_end = tl.cumsum(log2_gate(g_chunk + (t + 1 - C) * H_v, t < C - 1), 0, reverse=True)
                    from_start = tl.load(prefix_ptr + C + t)
                passing *= tl.exp2(from_start[:, None] + total + to_end[None, :])
            crossing += tl.sum(passing) * scale
        else:
            # What j begins, less what i ends: a scan of one row, not of all.
            changes = tl.sum(w, 0) - tl.sum(w, 1)
            crossing = (tl.cumsum(changes, 0) - changes) * scale
        tl.store(dg_ptr + vo + (first + t) * tl.cast(H_v, tl.int64), crossing, mask=first + t < last)


@triton.jit
def _products(
    a_ptr, b_ptr, a_first, a_last, b_first, b_last, row, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T [C, C] of two chunks' rows."""
    product = tl.zeros((C, C), tl.float32)
    for column in range(0, D, BD):
        a = load_chunk(a_ptr, a_first, column, a_last, row, D, C, BD, DESCRIPTORS)
        b = load_chunk(b_ptr, b_first, column, b_last, row, D, C, BD, DESCRIPTORS)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit
def _is_near(
    places_ptr, prefix_ptr, rate, total, chunk, chunks, T, C: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr
):
    """True if a chunk of such a log-decay, and both beside it in its run, let next to nothing pass."""
    near = False
    following = tl.minimum(chunk + 1, chunks - 1)
    between = (begins_run(places_ptr, chunk, PACKED) == 0) & (begins_run(places_ptr, following, PACKED) == 0)
    if between & (following > chunk):
        first, last = chunk_place(places_ptr, following, T, C, PACKED)
        earlier = C * rate
        later = (last - first) * rate
        if KIND == TOKEN:
            earlier = tl.load(prefix_ptr - 1)
            later = tl.load(prefix_ptr + 2 * C - 1)
        near = are_near(earlier, total, later)
    return near


@triton.jit
def are_near(earlier, total, later):
    """True where three chunks in a row of such log-decays let next to nothing pass."""
    return (earlier < NEAR_LOG2) & (total < NEAR_LOG2) & (later < NEAR_LOG2)
