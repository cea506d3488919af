"""The one loop behind outputs and gradients.

With L_ij = 2^between(i, j), all four are the same causal form, of other operands (S and D are the states that
enter a chunk from the past and, as gradients, from the future):

    o_i  = scale ( 2^prefix_i q_i S    + sum_{j <= i} L_ij (q_i . k_j) v_j )
    dq_i = scale ( 2^prefix_i do_i S^T + sum_{j <= i} L_ij (do_i . v_j) k_j )
    dv_j =         2^suffix_j k_j D    + scale sum_{i >= j} L_ij (k_j . q_i) do_i
    dk_j =         2^suffix_j v_j D^T  + scale sum_{i >= j} L_ij (v_j . do_i) q_i

that is, rows a against pairs (b, c): the state is the decayed sum of b c^T, so that S^T and D^T are accumulated as
such and no accumulator is ever transposed. A program walks one segment of one head for BC columns of c, state in
registers.

Decay gradients of one scalar per token need two more scalars per token (all dots over channels; slices add up):

    d_g_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s) + <S_end, D_end>

within a segment, where the end is the segment's. Pairs inside a chunk would cancel only up to their rounding, so
they are taken from one [C, C] matrix instead, row sums less column sums, in the sweep of dq ("terms"); what the
states add, in the sweeps of dq and dk. D_end is the sweep's own state before its first chunk.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_rows, state_product, store_rows
from lasp.kernels.triton.decay.gates import chunk_decay, pair_decay


@triton.jit
def sweep(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    g_ptr,  # all five at the segment's first token and the program's head, c and out at its first column
    a_row,
    b_row,
    c_row,
    out_row,
    g_row,  # elements from one token to the next
    x_ptr,  # q for the terms of dq, k for those of dk: laid out like c
    terms_ptr,  # per token, row g_row: what the sweep of dq writes and that of dk reads
    d_g_ptr,  # per token, row g_row: written by the sweep of dk
    carry,  # <S_end, D_end>, for the sweep of dk
    state,
    rate,
    scale,
    tokens,
    columns,  # those of c that exist, from the first
    A: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    WHOLE: tl.constexpr,  # no column of c is masked
    C: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunks = tl.cdiv(tokens, C)
    for step in range(chunks):
        index = chunks - 1 - step if REVERSE else step
        start = tl.cast(index * C, tl.int64)
        length = tl.minimum(tokens - index * C, C)
        a = load_rows(a_ptr + start * a_row, a_row, length, A, C, BA, A == BA)
        b = load_rows(b_ptr + start * b_row, b_row, length, A, C, BA, A == BA)
        c = load_rows(c_ptr + start * c_row, c_row, length, columns, C, BC, WHOLE)
        g_chunk = g_ptr + start * g_row
        prefix, suffix, total = chunk_decay(g_chunk, g_row, rate, length, KIND, C)
        pairs = pair_decay(g_chunk, g_row, rate, prefix, length, KIND, C, REVERSE, EXACT) * scale
        if REVERSE:
            from_state = tl.exp2(suffix)
            to_state = tl.exp2(prefix) * scale
        else:
            from_state = tl.exp2(prefix) * scale
            to_state = tl.exp2(suffix)

        scores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * pairs
        out = state_product(a, state, PRECISION) * from_state[:, None]
        if DECAY_GRADIENT:
            i = tl.arange(0, C)
            x = load_rows(x_ptr + start * c_row, c_row, length, columns, C, BC, WHOLE)
            through_state = tl.sum(x.to(tl.float32) * out, 1)
            if REVERSE:
                terms = tl.load(terms_ptr + (start + i) * g_row, mask=i < length, other=0.0) - through_state
                d_g = carry + tl.cumsum(terms, 0, reverse=True)
                carry += tl.sum(terms, 0)
                tl.store(d_g_ptr + (start + i) * g_row, d_g, mask=i < length)
            else:
                meet = tl.dot(x, tl.trans(c), input_precision=PRECISION) * scores
                meet = tl.where(i[:, None] > i[None, :], meet, 0.0)
                terms = tl.sum(meet, 1) - tl.sum(meet, 0) + through_state
                tl.store(terms_ptr + (start + i) * g_row, terms, mask=i < length)
        out = tl.dot(scores.to(c.dtype), c, out, input_precision=PRECISION)
        store_rows(out_ptr + start * out_row, out_row, out, length, columns, C, BC, WHOLE)

        weighted = (c * to_state[:, None]).to(c.dtype)
        state = tl.dot(tl.trans(b), weighted, state * tl.exp2(total), input_precision=PRECISION)
    return state


@triton.jit
def place(slices, segment_chunks, T, H_v, C: tl.constexpr):
    """Which slice, value head, batch and segment a program has, its first row [B * T] and its tokens."""
    part = tl.program_id(0) % slices
    head = tl.program_id(0) // slices % H_v
    batch = tl.program_id(0) // slices // H_v
    segment = tl.program_id(1)
    first = segment * segment_chunks * C
    row = tl.cast(batch, tl.int64) * T + first
    return part, head, batch, segment, row, tl.minimum(segment_chunks * C, T - first)
