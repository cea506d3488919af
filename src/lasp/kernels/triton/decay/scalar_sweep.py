"""The sweeps of dq and dk where the decay's gradient is wanted: as in `sweep`, and two scalars per token.

The gradient of one decay per token needs two more scalars per token (slices of channels add up):

    d_g_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s) + <S_end, D_end>

within a segment, where the end is the segment's. Products inside a chunk cancel exactly in it: both sweeps round
the same scores alike. D_end is the state of the sweep of dk before its first chunk.

The scalars are sums over columns. Untransposed, a thread holds whole runs of columns, so that here the state is
held as it is, [BA, BC], and outputs as [C, BC]; transposed sums cost more than the rest of the chunk.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_chunk, store_chunk, view
from lasp.kernels.triton.decay.gates import TOKEN, constant_gates, head_rate, load_gates, pair_decay


@triton.jit
def scalar_sweep(
    a_ptr,  # the operands as for `sweep`
    b_ptr,
    c_ptr,
    out_ptr,
    x_ptr,  # q for the sweep of dq, k for that of dk: laid out like c
    g_ptr,
    prefix_ptr,
    suffix_ptr,
    terms_ptr,  # [T] of the head and slice: the sweep of dq writes it, that of dk reads it
    d_g_ptr,  # [T] of the head and slice: written by the sweep of dk
    carry,  # <S_end, D_end> of the slice, for the sweep of dk
    state,  # [BA, BC]
    a_row,
    b_row,
    c_row,
    out_row,
    scale,
    T,
    H_v,
    batch,
    head,
    first,
    last,
    column,
    A: tl.constexpr,
    N: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype = c_ptr.dtype.element_ty
    a_view = view(a_ptr, T, a_row, A, C, BA, DESCRIPTORS)
    b_view = view(b_ptr, T, b_row, A, C, BA, DESCRIPTORS)
    c_view = view(c_ptr, T, c_row, N, C, BC, DESCRIPTORS)
    x_view = view(x_ptr, T, c_row, N, C, BC, DESCRIPTORS)
    out_view = view(out_ptr, T, out_row, N, C, BC, DESCRIPTORS)
    rate = head_rate(g_ptr, head, KIND)
    i = tl.arange(0, C)
    chunks = tl.cdiv(last - first, C)
    start = first + (tl.maximum(chunks - 1, 0) if REVERSE else 0) * C
    if KIND == TOKEN:
        prefix, suffix, total = load_gates(prefix_ptr + start, suffix_ptr + start, tl.minimum(last - start, C), C)
    for step in range(chunks):
        start = first + (chunks - 1 - step if REVERSE else step) * C
        length = tl.minimum(last - start, C)
        a = load_chunk(a_view, start, 0, T, a_row, A, C, BA, DESCRIPTORS)
        b = load_chunk(b_view, start, 0, T, b_row, A, C, BA, DESCRIPTORS)
        c = load_chunk(c_view, start, column, T, c_row, N, C, BC, DESCRIPTORS)
        x = load_chunk(x_view, start, column, T, c_row, N, C, BC, DESCRIPTORS)
        if KIND == TOKEN:
            ahead = start - C if REVERSE else start + C
            ahead_length = tl.where(step + 1 < chunks, tl.minimum(last - ahead, C), 0)
            next_gates = load_gates(prefix_ptr + ahead, suffix_ptr + ahead, ahead_length, C)
        else:
            prefix, suffix, total = constant_gates(rate, length, C)
        if REVERSE:
            terms = tl.load(terms_ptr + start + i, mask=i < length, other=0.0)
            from_state = tl.exp2(suffix)
            to_state = tl.exp2(prefix) * scale
        else:
            from_state = tl.exp2(prefix) * scale
            to_state = tl.exp2(suffix)

        # The state's own update first: it waits for nothing else in the chunk.
        entering = state
        weighted = (c * to_state[:, None]).to(dtype)
        state = tl.dot(tl.trans(b), weighted, state * tl.exp2(total), input_precision=PRECISION)
        if dtype == tl.bfloat16:
            out = tl.dot(a, entering.to(tl.bfloat16))
        else:
            out = tl.dot(a.to(tl.float32), entering, input_precision=PRECISION)
        g_chunk = g_ptr + (tl.cast(batch, tl.int64) * T + start) * H_v + head
        pairs = pair_decay(g_chunk, H_v, rate, prefix, length, KIND, C, not REVERSE, EXACT) * scale
        scores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * pairs
        out = tl.dot(scores.to(dtype), c, out * from_state[:, None], input_precision=PRECISION)

        own = tl.sum(x.to(tl.float32) * out, 1)
        if REVERSE:
            terms -= own
            tl.store(d_g_ptr + start + i, carry + tl.cumsum(terms, 0, reverse=True), mask=i < length)
            carry += tl.sum(terms, 0)
        else:
            tl.store(terms_ptr + start + i, own, mask=i < length)
        store_chunk(out_view, out.to(out_ptr.dtype.element_ty), start, column, T, out_row, N, C, BC, DESCRIPTORS)
        if KIND == TOKEN:
            prefix, suffix, total = next_gates
