# mypy: ignore-errors
"""The loop of `sweep` in rows, for the gradients of q and k where the decay's gradient is wanted too.

    out_i = from_state_i a_i S + scale sum_j L_ij (a_i . b_j) c_j,        S: the decayed sum of b^T c, [BA, BC]

with q . dq, or k . dk, token by token, in two parts as there: sums over columns, which stay within a warp, where
transposed outputs have them over rows, which do not. The price is the state's way through shared memory, as a right
operand. A program has 64 columns of out, of one head or of the sum of two that share q and k, which are then read once.
It takes bf16, and nothing is gathered.
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
    second,  # likewise of a second head, whose outputs are added to the first's; or None
    span,
    sizes: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    SHORTEST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    HEADS: tl.constexpr = 1 if second is None else 2
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
    # Neighbouring heads' columns are neighbours.
    a_view = view(operands.a_ptr, last, a_row, HEADS * A, C, BA, DESCRIPTORS)
    b_view = view(operands.b_ptr, last, a_row, HEADS * A, C, BA, DESCRIPTORS)
    c_view = view(operands.c_ptr, last, c_row, N, C, BC, DESCRIPTORS)
    x_view = view(terms.x_ptr, last, c_row, N, C, BC, DESCRIPTORS)
    # Descriptors store from shared memory, which twice as wide gradients (fp32, of grouped heads) would overfill.
    STORES: tl.constexpr = DESCRIPTORS and operands.out_ptr.dtype.element_ty == dtype
    out_view = view(operands.out_ptr, last, out_row, N, C, BC, STORES)
    skipped = tl.zeros((C,), tl.float32)
    second_skipped = tl.zeros((C,), tl.float32)
    chunks = tl.cdiv(last - first, C)
    for turn in range(tl.cdiv(chunks, terms.interval)):
        begin, end = next_interval(turn, chunks, terms.interval, REVERSE)
        inner_ptr = terms.inner_ptr + begin // SHORTEST * terms.inner_row
        if not REVERSE:
            leave(inner_ptr, state)
            if HEADS == 2:
                leave(inner_ptr + terms.next_inner, second)
        for step in range(begin, end):
            start = first + (begin + end - 1 - step if REVERSE else step) * C
            a = load_chunk(a_view, start, 0, last, a_row, HEADS * A, C, BA, DESCRIPTORS)
            b = load_chunk(b_view, start, 0, last, a_row, HEADS * A, C, BA, DESCRIPTORS)
            c = load_chunk(c_view, start, column, last, c_row, N, C, BC, DESCRIPTORS)
            x = load_chunk(x_view, start, column, last, c_row, N, C, BC, DESCRIPTORS)
            length = tl.minimum(last - start, C)
            at = span.slot + start
            sums = terms.sums_ptr + at + tl.arange(0, C)
            out, of_state, of_chunk, own, state = _chunk_of_head(
                a, b, c, x, state, decay, 0, at, length, KIND, C, REVERSE, PRECISION, WEIGHS
            )
            if WEIGHS and not REVERSE:
                skipped += own
            # Triton loads ahead only what a product takes. Without one, if only with zeros, every chunk would wait for
            # x.
            of_chunk += tl.sum(tl.dot(x, tl.zeros((BC, 16), dtype), input_precision=PRECISION), 1)
            tl.store(sums, of_state)
            tl.store(sums + terms.sums_row, of_chunk)
            if HEADS == 2:
                a = load_chunk(a_view, start, A, last, a_row, HEADS * A, C, BA, DESCRIPTORS)
                b = load_chunk(b_view, start, A, last, a_row, HEADS * A, C, BA, DESCRIPTORS)
                other, of_state, of_chunk, own, second = _chunk_of_head(
                    a, b, c, x, second, decay, terms.next_gates, at, length, KIND, C, REVERSE, PRECISION, WEIGHS
                )
                if WEIGHS and not REVERSE:
                    second_skipped += own
                tl.store(sums + terms.next_gates, of_state)
                tl.store(sums + terms.next_gates + terms.sums_row, of_chunk)
                out += other
            store_chunk(
                out_view, out.to(operands.out_ptr.dtype.element_ty), start, column, last, out_row, N, C, BC, STORES
            )
        if REVERSE:
            leave(inner_ptr, state)
            if HEADS == 2:
                leave(inner_ptr + terms.next_inner, second)
    if WEIGHS and not REVERSE:
        tl.store(terms.skipped_ptr, tl.sum(skipped, 0))
        if HEADS == 2:
            tl.store(terms.skipped_ptr + terms.next_skipped, tl.sum(second_skipped, 0))


@triton.jit
def _chunk_of_head(
    a,
    b,
    c,
    x,
    state,
    decay,
    beside,  # how far the head's gates' sums are from those of `decay`
    at,
    length,
    KIND: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    """A chunk's part of out; x . out of the state, and of the chunk; a . b, of which a skip's gradient is made; and the
    state after the chunk."""
    # By differences of prefixes where distances would do too: those of all pairs would fill registers over the loop.
    PAIRS: tl.constexpr = NONE if KIND == NONE else TOKEN
    dtype = c.dtype
    # Loaded every time for the same reason.
    rate = head_rate(decay.g_ptr, KIND)
    prefix, added, total, from_state, to_state = chunk_decays(
        decay.prefix_ptr + beside, decay.suffix_ptr + beside, at, rate, length, decay.scale, KIND, C, REVERSE, False,
        WEIGHS,
    )  # fmt: skip
    pairs = pair_decay(decay.g_ptr, decay.H_v, rate, prefix, added, length, PAIRS, C, not REVERSE, False)

    b_t = tl.trans(b)
    read = tl.dot(a, state.to(dtype), input_precision=PRECISION)
    products = tl.dot(a, b_t, input_precision=PRECISION)
    own = tl.zeros((C,), tl.float32)
    if WEIGHS and not REVERSE:
        own = own_products(products)
    weights = (products * pairs).to(dtype)
    within = tl.dot(weights, c, input_precision=PRECISION) * decay.scale
    out = tl.fma(read, from_state[:, None], within)
    # x weighted and rounded as in `sweep`.
    weighted = (x * from_state[:, None]).to(dtype).to(tl.float32)
    of_state = tl.sum(weighted * read, 1)
    of_chunk = tl.sum(x.to(tl.float32) * within, 1)
    return out, of_state, of_chunk, own, add_chunk(state, b_t, c, to_state, total, KIND, REVERSE, True, PRECISION)
