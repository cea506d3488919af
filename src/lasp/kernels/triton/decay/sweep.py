# ruff: noqa: SIM108
"""The one loop behind outputs and gradients.

With L_ij = 2^between(i, j), all four are the same causal form, of other operands (S and D are the states that
enter a chunk from the past and, as gradients, from the future):

    o_i  = scale ( 2^prefix_i q_i S    + sum_{j <= i} L_ij (q_i . k_j) v_j )
    dq_i = scale ( 2^prefix_i do_i S^T + sum_{j <= i} L_ij (do_i . v_j) k_j )
    dv_j =         2^suffix_j k_j D    + scale sum_{i >= j} L_ij (k_j . q_i) do_i
    dk_j =         2^suffix_j v_j D^T  + scale sum_{i >= j} L_ij (v_j . do_i) q_i

that is, rows a against pairs (b, c): the state is the decayed sum of b c^T. A program walks one segment of one head
for BC columns of c. It holds the transposed state, sum of c b^T, [BC, BA], and forms transposed outputs [BC, C]:
so the state is the left operand of its product, taken from registers, and no accumulator is transposed to be one.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_chunk, store_chunk, view
from lasp.kernels.triton.decay.gates import NONE, TOKEN, constant_gates, head_rate, load_gates, pair_decay


@triton.jit
def sweep(
    a_ptr,  # the row operand, c_ptr the one whose columns are out's: all at [B, T, heads, dim] of the batch and head
    b_ptr,
    c_ptr,
    out_ptr,
    g_ptr,  # [H_v], [B, T, H_v] or unused
    prefix_ptr,  # [T] of the head
    suffix_ptr,
    state,  # [BC, BA]
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
    out_view = view(out_ptr, T, out_row, N, C, BC, DESCRIPTORS)
    rate = head_rate(g_ptr, head, KIND)
    chunks = tl.cdiv(last - first, C)
    # Gates are loaded a chunk ahead: nothing else hides their latency.
    start = first + (tl.maximum(chunks - 1, 0) if REVERSE else 0) * C
    if KIND == TOKEN:
        prefix, suffix, total = load_gates(prefix_ptr + start, suffix_ptr + start, tl.minimum(last - start, C), C)
    for step in range(chunks):
        start = first + (chunks - 1 - step if REVERSE else step) * C
        length = tl.minimum(last - start, C)
        a = load_chunk(a_view, start, 0, T, a_row, A, C, BA, DESCRIPTORS)
        b = load_chunk(b_view, start, 0, T, b_row, A, C, BA, DESCRIPTORS)
        c_t = tl.trans(load_chunk(c_view, start, column, T, c_row, N, C, BC, DESCRIPTORS))
        if KIND == TOKEN:
            ahead = start - C if REVERSE else start + C
            ahead_length = tl.where(step + 1 < chunks, tl.minimum(last - ahead, C), 0)
            next_gates = load_gates(prefix_ptr + ahead, suffix_ptr + ahead, ahead_length, C)
        else:
            prefix, suffix, total = constant_gates(rate, length, C)
        g_chunk = g_ptr + (tl.cast(batch, tl.int64) * T + start) * H_v + head
        pairs = pair_decay(g_chunk, H_v, rate, prefix, length, KIND, C, REVERSE, EXACT) * scale
        if REVERSE:
            from_state = tl.exp2(suffix)
            to_state = tl.exp2(prefix) * scale
        else:
            from_state = tl.exp2(prefix) * scale
            to_state = tl.exp2(suffix)

        a_t = tl.trans(a)
        if dtype == tl.bfloat16:
            out = tl.dot(state.to(tl.bfloat16), a_t)
        else:
            # A state may exceed fp16's range: its product is taken in fp32 operands (rounded as PRECISION says).
            out = tl.dot(state, a_t.to(tl.float32), input_precision=PRECISION)
        scores = tl.dot(b, a_t, input_precision=PRECISION) * pairs
        out = tl.dot(c_t, scores.to(dtype), out * from_state[None, :], input_precision=PRECISION)

        if KIND == NONE and not REVERSE:
            weighted = c_t
        else:
            weighted = (c_t * to_state[None, :]).to(dtype)
        state = tl.dot(weighted, b, state * tl.exp2(total), input_precision=PRECISION)

        o = tl.trans(out).to(out_ptr.dtype.element_ty)
        store_chunk(out_view, o, start, column, T, out_row, N, C, BC, DESCRIPTORS)
        if KIND == TOKEN:
            prefix, suffix, total = next_gates
    return state


@triton.jit
def place(slices, segment_chunks, T, H_v, C: tl.constexpr):
    """Which slice, value head, batch and segment a program has; its first token and the one after its last."""
    part = tl.program_id(0) % slices
    head = tl.program_id(0) // slices % H_v
    batch = tl.program_id(0) // slices // H_v
    first = tl.program_id(1) * segment_chunks * C
    return part, head, batch, tl.program_id(1), first, tl.minimum(first + segment_chunks * C, T)
