# mypy: ignore-errors
"""The loop of `sweep` for two neighbouring heads that share q and k, which are then read once, as is their product.

For o and dv of narrow heads: of 64 values, q and k are two thirds of what a head's chunk reads. The program's columns
are all of a head's.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import TOKEN, chunk_decays, pair_decay
from lasp.kernels.triton.common.program import load_chunk, store_chunk, view
from lasp.kernels.triton.decay.scalar.sweep import add_chunk, read_state


@triton.jit
def sweep_pair(
    operands,  # these as in `sweep`, of the first head; the columns of c and out of the second follow
    decay,  # of the first head, by a gate per token; the sums of the second's are next_gates further on
    next_gates,
    state,  # [BC, BA]
    second,  # likewise, of the second head
    span,
    sizes: tl.constexpr,
    REVERSE: tl.constexpr,
    WEIGH_B: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr,
    skip,  # of either head, or None
    second_skip,
):
    """Both states after the segment; out is written."""
    A: tl.constexpr = sizes.A
    N: tl.constexpr = sizes.N
    BA: tl.constexpr = sizes.BA
    BC: tl.constexpr = sizes.BC
    C: tl.constexpr = sizes.C
    tl.static_assert(BC == N)
    last = span.last
    a_view = view(operands.a_ptr, last, operands.a_row, A, C, BA, DESCRIPTORS)
    b_view = view(operands.b_ptr, last, operands.b_row, A, C, BA, DESCRIPTORS)
    c_view = view(operands.c_ptr, last, operands.c_row, 2 * N, C, BC, DESCRIPTORS)
    out_view = view(operands.out_ptr, last, operands.out_row, 2 * N, C, BC, DESCRIPTORS)
    chunks = tl.cdiv(last - span.first, C)
    for step in range(chunks):
        start = span.first + (chunks - 1 - step if REVERSE else step) * C
        a = load_chunk(a_view, start, 0, last, operands.a_row, A, C, BA, DESCRIPTORS)
        b = load_chunk(b_view, start, 0, last, operands.b_row, A, C, BA, DESCRIPTORS)
        c = load_chunk(c_view, start, 0, last, operands.c_row, 2 * N, C, BC, DESCRIPTORS)
        other_c = load_chunk(c_view, start, N, last, operands.c_row, 2 * N, C, BC, DESCRIPTORS)
        at = span.slot + start
        products = tl.dot(b, tl.trans(a), input_precision=PRECISION)
        out, state = _chunk_of_head(
            products, a, b, c, state, decay, 0, skip, at, last - start, C, REVERSE, WEIGH_B, PRECISION, WEIGHS
        )
        store_chunk(out_view, out, start, 0, last, operands.out_row, 2 * N, C, BC, DESCRIPTORS)
        out, second = _chunk_of_head(
            products, a, b, other_c, second, decay, next_gates, second_skip, at, last - start, C, REVERSE, WEIGH_B,
            PRECISION, WEIGHS,
        )  # fmt: skip
        store_chunk(out_view, out, start, N, last, operands.out_row, 2 * N, C, BC, DESCRIPTORS)
    return state, second


@triton.jit
def _chunk_of_head(
    products,
    a,
    b,
    c,
    state,
    decay,
    beside,
    skip,
    at,
    length,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    WEIGH_B: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    """A head's out of a chunk, and its state after it."""
    prefix, added, total, from_state, to_state = chunk_decays(
        decay.prefix_ptr + beside, decay.suffix_ptr + beside, at, 0.0, length, decay.scale, TOKEN, C, REVERSE, False,
        WEIGHS,
    )  # fmt: skip
    pairs = pair_decay(decay.g_ptr, decay.H_v, 0.0, prefix, added, length, TOKEN, C, REVERSE, False) * decay.scale
    c_t = tl.trans(c)
    read = read_state(state, tl.trans(a), False, PRECISION) * from_state[None, :]
    if skip is not None:
        read += skip * c_t
    out = tl.dot(c_t, (products * pairs).to(c.dtype), read, input_precision=PRECISION)
    after = add_chunk(state, c_t, b, to_state, total, TOKEN, REVERSE, WEIGH_B, PRECISION)
    return tl.trans(out).to(c.dtype), after
