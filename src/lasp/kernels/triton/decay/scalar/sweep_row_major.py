"""The loop of `sweep` in rows, for the gradients of q and k where the decay's gradient is wanted too.

    out_i = from_state_i a_i S + scale sum_j L_ij (a_i . b_j) c_j,        S: the decayed sum of b^T c, [BA, BC]

with q . dq, or k . dk, token by token, in two parts as there: sums over columns, which stay within a warp, where
transposed outputs have them over rows, which do not. The price is the state's way through shared memory, as a right
operand. A program has 64 columns of out. It takes bf16, and nothing is gathered.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import NONE, TOKEN, chunk_decays, head_rate, pair_decay
from lasp.kernels.triton.common.tiles import load_chunk, store_chunk, view
from lasp.kernels.triton.decay.scalar.intervals import leave, legs_in, next_leg
from lasp.kernels.triton.decay.scalar.sweep import add_chunk


@triton.jit
def sweep_rows(
    a_ptr,  # all as in `sweep`
    b_ptr,
    c_ptr,
    out_ptr,
    g_ptr,
    prefix_ptr,
    x_ptr,
    sums_ptr,  # [2, sums_row], written: of the program's columns
    inner_ptr,
    state,  # [BA, BC]
    a_row,
    c_row,
    out_row,
    sums_row,
    scale,
    H_v,
    first,
    last,
    slot,
    column,
    A: tl.constexpr,
    N: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype = c_ptr.dtype.element_ty
    a_view = view(a_ptr, last, a_row, A, C, BA, DESCRIPTORS)
    b_view = view(b_ptr, last, a_row, A, C, BA, DESCRIPTORS)
    c_view = view(c_ptr, last, c_row, N, C, BC, DESCRIPTORS)
    x_view = view(x_ptr, last, c_row, N, C, BC, DESCRIPTORS)
    # Descriptors store from shared memory, which twice as wide gradients (fp32, of grouped heads) would overfill.
    STORES: tl.constexpr = DESCRIPTORS and out_ptr.dtype.element_ty == dtype
    out_view = view(out_ptr, last, out_row, N, C, BC, STORES)
    # By differences of prefixes where distances would do too: those of all pairs would fill registers over the loop.
    PAIRS: tl.constexpr = NONE if KIND == NONE else TOKEN
    chunks = tl.cdiv(last - first, C)
    for turn in range(legs_in(chunks, False)):
        begin, end = next_leg(turn, chunks, REVERSE, False)
        leave(inner_ptr, end if REVERSE else begin, chunks, state, column, N, A, BC, BA, True, False)
        for step in range(begin, end):
            start = first + (begin + end - 1 - step if REVERSE else step) * C
            a = load_chunk(a_view, start, 0, last, a_row, A, C, BA, DESCRIPTORS)
            b = load_chunk(b_view, start, 0, last, a_row, A, C, BA, DESCRIPTORS)
            c = load_chunk(c_view, start, column, last, c_row, N, C, BC, DESCRIPTORS)
            x = load_chunk(x_view, start, column, last, c_row, N, C, BC, DESCRIPTORS)
            # Loaded every time for the same reason.
            rate = head_rate(g_ptr, KIND)
            length = tl.minimum(last - start, C)
            prefix, total, from_state, to_state = chunk_decays(
                prefix_ptr, prefix_ptr, slot + start, rate, length, scale, KIND, C, REVERSE, False
            )
            pairs = pair_decay(g_ptr, H_v, rate, prefix, length, PAIRS, C, not REVERSE, False)

            b_t = tl.trans(b)
            read = tl.dot(a, state.to(dtype), input_precision=PRECISION)
            weights = (tl.dot(a, b_t, input_precision=PRECISION) * pairs).to(dtype)
            within = tl.dot(weights, c, input_precision=PRECISION) * scale
            out = tl.fma(read, from_state[:, None], within)
            store_chunk(out_view, out.to(out_ptr.dtype.element_ty), start, column, last, out_row, N, C, BC, STORES)
            # x weighted and rounded as in `sweep`.
            weighted = (x * from_state[:, None]).to(dtype).to(tl.float32)
            of_state = tl.sum(weighted * read, 1)
            of_chunk = tl.sum(x.to(tl.float32) * within, 1)
            # Triton loads ahead only what a product takes. Without one, if only with zeros, every chunk would wait for
            # x.
            of_chunk += tl.sum(tl.dot(x, tl.zeros((BC, 16), dtype), input_precision=PRECISION), 1)
            tl.store(sums_ptr + slot + start + tl.arange(0, C), of_state)
            tl.store(sums_ptr + sums_row + slot + start + tl.arange(0, C), of_chunk)

            state = add_chunk(state, b_t, c, to_state, total, KIND, REVERSE, True, PRECISION)
    return state
