# mypy: ignore-errors
"""The loop of `sweep` in rows, for the gradients of q and k where the decay's gradient is wanted too.

    out_i = from_state_i a_i S + scale sum_j L_ij (a_i . b_j) c_j,        S: the decayed sum of b^T c, [BA, BC]

with q . dq, or k . dk, token by token, in two parts as there: sums over columns, which stay within a warp, where
transposed outputs have them over rows, which do not. The price is the state's way through shared memory, as a right
operand. A program has 64 columns of out. It takes bf16, and nothing is gathered.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import NONE, TOKEN, chunk_decays, head_rate, pair_decay
from lasp.kernels.triton.common.program import load_chunk, store_chunk, view
from lasp.kernels.triton.decay.intervals import leave, next_interval
from lasp.kernels.triton.decay.scalar.sweep import add_chunk, own_products


@triton.jit
def sweep_rows(
    operands,  # these as in `sweep`; a and b lie alike
    decay,
    terms,  # sums_ptr: [2, sums_row], written: of the program's columns
    state,  # [BA, BC]
    span,
    sizes: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    SHORTEST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    A: tl.constexpr = sizes.A
    N: tl.constexpr = sizes.N
    BA: tl.constexpr = sizes.BA
    BC: tl.constexpr = sizes.BC
    C: tl.constexpr = sizes.C
    dtype = operands.c_ptr.dtype.element_ty
    first = span.first
    last = span.last
    column = span.column
    a_row = operands.a_row
    c_row = operands.c_row
    out_row = operands.out_row
    a_view = view(operands.a_ptr, last, a_row, A, C, BA, DESCRIPTORS)
    b_view = view(operands.b_ptr, last, a_row, A, C, BA, DESCRIPTORS)
    c_view = view(operands.c_ptr, last, c_row, N, C, BC, DESCRIPTORS)
    x_view = view(terms.x_ptr, last, c_row, N, C, BC, DESCRIPTORS)
    # Descriptors store from shared memory, which twice as wide gradients (fp32, of grouped heads) would overfill.
    STORES: tl.constexpr = DESCRIPTORS and operands.out_ptr.dtype.element_ty == dtype
    out_view = view(operands.out_ptr, last, out_row, N, C, BC, STORES)
    # By differences of prefixes where distances would do too: those of all pairs would fill registers over the loop.
    PAIRS: tl.constexpr = NONE if KIND == NONE else TOKEN
    skipped = tl.zeros((C,), tl.float32)
    chunks = tl.cdiv(last - first, C)
    for turn in range(tl.cdiv(chunks, terms.interval)):
        begin, end = next_interval(turn, chunks, terms.interval, REVERSE)
        inner_ptr = terms.inner_ptr + begin // SHORTEST * terms.inner_row
        if not REVERSE:
            leave(inner_ptr, state)
        for step in range(begin, end):
            start = first + (begin + end - 1 - step if REVERSE else step) * C
            a = load_chunk(a_view, start, 0, last, a_row, A, C, BA, DESCRIPTORS)
            b = load_chunk(b_view, start, 0, last, a_row, A, C, BA, DESCRIPTORS)
            c = load_chunk(c_view, start, column, last, c_row, N, C, BC, DESCRIPTORS)
            x = load_chunk(x_view, start, column, last, c_row, N, C, BC, DESCRIPTORS)
            # Loaded every time for the same reason.
            rate = head_rate(decay.g_ptr, KIND)
            length = tl.minimum(last - start, C)
            at = span.slot + start
            prefix, added, total, from_state, to_state = chunk_decays(
                decay.prefix_ptr, decay.suffix_ptr, at, rate, length, decay.scale, KIND, C, REVERSE, False, WEIGHS
            )
            pairs = pair_decay(decay.g_ptr, decay.H_v, rate, prefix, added, length, PAIRS, C, not REVERSE, False)

            b_t = tl.trans(b)
            read = tl.dot(a, state.to(dtype), input_precision=PRECISION)
            products = tl.dot(a, b_t, input_precision=PRECISION)
            if WEIGHS and not REVERSE:
                skipped += own_products(products, column == 0)
            weights = (products * pairs).to(dtype)
            within = tl.dot(weights, c, input_precision=PRECISION) * decay.scale
            out = tl.fma(read, from_state[:, None], within)
            store_chunk(
                out_view, out.to(operands.out_ptr.dtype.element_ty), start, column, last, out_row, N, C, BC, STORES
            )
            # x weighted and rounded as in `sweep`.
            weighted = (x * from_state[:, None]).to(dtype).to(tl.float32)
            of_state = tl.sum(weighted * read, 1)
            of_chunk = tl.sum(x.to(tl.float32) * within, 1)
            # Triton loads ahead only what a product takes. Without one, if only with zeros, every chunk would wait for
            # x.
            of_chunk += tl.sum(tl.dot(x, tl.zeros((BC, 16), dtype), input_precision=PRECISION), 1)
            tl.store(terms.sums_ptr + span.slot + start + tl.arange(0, C), of_state)
            tl.store(terms.sums_ptr + terms.sums_row + span.slot + start + tl.arange(0, C), of_chunk)

            state = add_chunk(state, b_t, c, to_state, total, KIND, REVERSE, True, PRECISION)
        if REVERSE:
            leave(inner_ptr, state)
    if WEIGHS and not REVERSE:  # noqa: SIM102  (known, and not known, to the compiler)
        if column == 0:
            tl.store(terms.skipped_ptr, tl.sum(skipped, 0))
    return state
