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

Where the decay's gradient is wanted (SUMS), the sweeps of dq and dk also yield q_i . dq_i and k_j . dk_j (see
gate_gradient), each in parts of PART_ROWS columns of out: so much a warp adds up by itself.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_chunk, store_chunk, view
from lasp.kernels.triton.decay.gates import NONE, chunk_decays, head_rate, pair_decay

PART_ROWS = tl.constexpr(16)


@triton.jit
def sweep(
    a_ptr,  # the row operand, c_ptr the one whose columns are out's: all at [B, T, heads, dim] of the batch and head
    b_ptr,
    c_ptr,
    out_ptr,
    g_ptr,  # [H_v], [B, T, H_v] or unused
    prefix_ptr,  # [chunks C] of the head: prefix
    suffix_ptr,  # likewise: suffix; unused unless EXACT
    x_ptr,  # if SUMS: q for the sweep of dq, k for that of dk: laid out like c
    sums_ptr,  # if SUMS: [parts, sums_row], written; at the head and the slice's first part
    state,  # [BC, BA]
    a_row,
    b_row,
    c_row,
    out_row,
    sums_row,
    scale,
    T,
    H_v,
    batch,
    head,
    first,
    last,
    slot,  # of the first token in [chunks C], less the token
    column,
    A: tl.constexpr,
    N: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMS: tl.constexpr,
    EXACT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype = c_ptr.dtype.element_ty
    a_view = view(a_ptr, last, a_row, A, C, BA, DESCRIPTORS)
    b_view = view(b_ptr, last, b_row, A, C, BA, DESCRIPTORS)
    c_view = view(c_ptr, last, c_row, N, C, BC, DESCRIPTORS)
    out_view = view(out_ptr, last, out_row, N, C, BC, DESCRIPTORS)
    if SUMS:
        x_view = view(x_ptr, last, c_row, N, C, BC, DESCRIPTORS)
    rate = head_rate(g_ptr, head, KIND)
    chunks = tl.cdiv(last - first, C)
    for step in range(chunks):
        start = first + (chunks - 1 - step if REVERSE else step) * C
        length = tl.minimum(last - start, C)
        a = load_chunk(a_view, start, 0, last, a_row, A, C, BA, DESCRIPTORS)
        b = load_chunk(b_view, start, 0, last, b_row, A, C, BA, DESCRIPTORS)
        c_t = tl.trans(load_chunk(c_view, start, column, last, c_row, N, C, BC, DESCRIPTORS))
        if SUMS:
            x = load_chunk(x_view, start, column, last, c_row, N, C, BC, DESCRIPTORS)
        prefix, total, from_state, to_state = chunk_decays(
            prefix_ptr, suffix_ptr, slot + start, rate, length, scale, KIND, C, REVERSE, EXACT
        )
        g_chunk = g_ptr + (tl.cast(batch, tl.int64) * T + start) * H_v + head
        pairs = pair_decay(g_chunk, H_v, rate, prefix, length, KIND, C, REVERSE, EXACT) * scale

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
        store_chunk(out_view, o, start, column, last, out_row, N, C, BC, DESCRIPTORS)
        if SUMS:
            parts: tl.constexpr = BC // PART_ROWS
            own = tl.reshape(tl.trans(x).to(tl.float32) * out, (parts, PART_ROWS, C))
            rows = tl.arange(0, parts)[:, None] * sums_row + slot + start
            tl.store(sums_ptr + rows + tl.arange(0, C)[None, :], tl.sum(own, 1))
    return state


@triton.jit
def as_swept(state, dtype: tl.constexpr):
    """A state as the sweeps of inputs of `dtype` round it, in fp32: so that in <S, D> what the last tokens add to S
    cancels."""
    return state.to(tl.bfloat16).to(tl.float32) if dtype == tl.bfloat16 else state


@triton.jit
def place(places_ptr, slices, segments, segment_chunks, T, H_v, C: tl.constexpr, PACKED: tl.constexpr):
    """Where a program is: slice, value head, batch and segment; its first token and the one after its last; its first
    chunk; the index of the state [B or documents, H_v] at the run's borders; whether the segment is the run's last.

    places_ptr: int32 [segments, 5] if PACKED, see `layout`.
    """
    part = tl.program_id(0) % slices
    head = tl.program_id(0) // slices % H_v
    batch = tl.program_id(0) // slices // H_v
    segment = tl.program_id(1)
    if PACKED:
        entry = places_ptr + segment * 5
        first = tl.load(entry)
        last = tl.load(entry + 1)
        chunk = tl.load(entry + 2)
        border = tl.load(entry + 3).to(tl.int64) * H_v + head
        ends = tl.load(entry + 4) != 0
    else:
        first = segment * segment_chunks * C
        last = tl.minimum(first + segment_chunks * C, T)
        chunk = segment * segment_chunks
        border = tl.cast(batch, tl.int64) * H_v + head
        ends = segment == segments - 1
    return part, head, batch, segment, first, last, chunk, border, ends


@triton.jit
def chunk_place(places_ptr, T, C: tl.constexpr, PACKED: tl.constexpr):
    """The first token of a program's chunk, and the one after its last.

    places_ptr: int32 [chunks, 2] if PACKED, see `layout`.
    """
    if PACKED:
        first = tl.load(places_ptr + tl.program_id(1) * 2)
        last = tl.load(places_ptr + tl.program_id(1) * 2 + 1)
    else:
        first = tl.program_id(1) * C
        last = tl.minimum(first + C, T)
    return first, last
