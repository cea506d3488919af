# mypy: ignore-errors
"""The one loop behind outputs and gradients.

With L_ij = 2^between(i, j), all four are the same causal form, of other operands (S and D are the states that enter a
chunk from the past and, as gradients, from the future); where tokens have weights, L_ij and 2^suffix_j have j's:

    o_i  = scale ( 2^prefix_i q_i S    + sum_{j <= i} L_ij (q_i . k_j) v_j )
    dq_i = scale ( 2^prefix_i do_i S^T + sum_{j <= i} L_ij (do_i . v_j) k_j )
    dv_j =         2^suffix_j k_j D    + scale sum_{i >= j} L_ij (k_j . q_i) do_i
    dk_j =         2^suffix_j v_j D^T  + scale sum_{i >= j} L_ij (v_j . do_i) q_i

that is, rows a against pairs (b, c): the state is the decayed sum of b c^T. A program walks one segment of one head
for BC columns of c. The state that enters the segment comes from summaries; or, of short runs, the program first
gathers it from all tokens before the segment (after, for gradients), which saves two launches (`gather`).
It holds the transposed state, sum of c b^T, [BC, BA], and forms transposed outputs [BC, C]:
so the state is the left operand of its product, taken from registers, and no accumulator is transposed to be one.

Where the decay's gradient is wanted (SUMS), the sweeps of dq and dk also yield q_i . dq_i and k_j . dk_j (see
gate_gradient), what comes of the state apart from what comes of the chunk, each in parts of PART_ROWS columns of out:
so much a warp adds up by itself. They leave their states before intervals (`intervals`).
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import NONE, chunk_decays, decayed, head_rate, pair_decay
from lasp.kernels.triton.common.program import load_chunk, run_bounds, store_chunk, view
from lasp.kernels.triton.decay.intervals import leave, next_interval

PART_ROWS = tl.constexpr(16)
BLOCK_CHUNKS = tl.constexpr(2)  # of the blocks of `grouped`
TF32_MASK = tl.constexpr(-(1 << 13))  # of the 10 bits that tf32 keeps of a mantissa of 23
MIN_ROUNDED = tl.constexpr(2.0**-12)  # fp16's precision ends at 2^-14


@triton.jit
def sweep(
    operands,
    decay,
    terms,  # GateTerms, or None where they are not wanted
    state,  # [BC, BA]
    span,
    sizes: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    WEIGH_B: tl.constexpr,  # whether b, not c, is weighted as it is added to the state: see `add_chunk`
    EXACT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    SHORTEST: tl.constexpr = 0,  # interval, of `terms`
    WEIGHS: tl.constexpr = False,  # whether tokens have weights
    skip=None,  # out has so much of c, unless None; not with `terms`
    blocks=None,  # `BlockPlaces` after which states are left, if REVERSE
):
    """The state after the segment; out is written, and what `terms` say."""
    SUMS: tl.constexpr = terms is not None
    A: tl.constexpr = sizes.A
    N: tl.constexpr = sizes.N
    BA: tl.constexpr = sizes.BA
    BC: tl.constexpr = sizes.BC
    C: tl.constexpr = sizes.C
    dtype = operands.c_ptr.dtype.element_ty
    rate = head_rate(decay.g_ptr, KIND)
    first = span.first
    last = span.last
    column = span.column
    a_view = view(operands.a_ptr, last, operands.a_row, A, C, BA, DESCRIPTORS)
    b_view = view(operands.b_ptr, last, operands.b_row, A, C, BA, DESCRIPTORS)
    c_view = view(operands.c_ptr, last, operands.c_row, N, C, BC, DESCRIPTORS)
    out_view = view(operands.out_ptr, last, operands.out_row, N, C, BC, DESCRIPTORS)
    if SUMS:
        x_view = view(terms.x_ptr, last, operands.c_row, N, C, BC, DESCRIPTORS)
        skipped = tl.zeros((C,), tl.float32)
    chunks = tl.cdiv(last - first, C)
    for turn in range(tl.cdiv(chunks, terms.interval) if SUMS else 1):
        begin, end = 0, chunks
        if SUMS:
            begin, end = next_interval(turn, chunks, terms.interval, REVERSE)
            inner_ptr = terms.inner_ptr + begin // SHORTEST * terms.inner_row
            if not REVERSE:
                leave(inner_ptr, state)
        for step in range(begin, end):
            start = first + (begin + end - 1 - step if REVERSE else step) * C
            length = tl.minimum(last - start, C)
            if blocks is not None:
                chunk = blocks.first + (start - first) // C
                after = (chunk % BLOCK_CHUNKS == BLOCK_CHUNKS - 1) | (start + C >= blocks.tokens)
                leave_block(blocks.ptr + tl.cast(chunk // BLOCK_CHUNKS, tl.int64) * blocks.row, state, after)
            a = load_chunk(a_view, start, 0, last, operands.a_row, A, C, BA, DESCRIPTORS)
            b = load_chunk(b_view, start, 0, last, operands.b_row, A, C, BA, DESCRIPTORS)
            c_t = tl.trans(load_chunk(c_view, start, column, last, operands.c_row, N, C, BC, DESCRIPTORS))
            if SUMS:
                x = load_chunk(x_view, start, column, last, operands.c_row, N, C, BC, DESCRIPTORS)
            at = span.slot + start
            prefix, added, total, from_state, to_state = chunk_decays(
                decay.prefix_ptr, decay.suffix_ptr, at, rate, length, decay.scale, KIND, C, REVERSE, EXACT, WEIGHS
            )
            g_chunk = decay.g_ptr + tl.cast(start, tl.int64) * decay.H_v
            pairs = pair_decay(g_chunk, decay.H_v, rate, prefix, added, length, KIND, C, REVERSE, EXACT) * decay.scale

            a_t = tl.trans(a)
            read = read_state(state, a_t, SUMS, PRECISION)
            products = tl.dot(b, a_t, input_precision=PRECISION)
            if SUMS and WEIGHS and not REVERSE:
                skipped += own_products(products, span.column == 0)
            products *= pairs
            if skip is not None:
                # A token's own pair has its skip: c itself would have to be brought into out's layout.
                products += tl.where(own_pairs(C), skip, 0.0)
            scores = products.to(dtype)
            if SUMS:
                within = tl.dot(c_t, scores, input_precision=PRECISION)
                out = tl.fma(read, from_state[None, :], within)
            else:
                out = tl.dot(c_t, scores, read * from_state[None, :], input_precision=PRECISION)

            state = add_chunk(state, c_t, b, to_state, total, KIND, REVERSE, WEIGH_B, PRECISION)
            o = tl.trans(out).to(operands.out_ptr.dtype.element_ty)
            store_chunk(out_view, o, start, column, last, operands.out_row, N, C, BC, DESCRIPTORS)
            if SUMS:
                parts: tl.constexpr = BC // PART_ROWS
                # What is read is summed with x rounded with its decay, as the other sweep adds x to its state: their
                # difference then lacks that rounding (gate_gradient). Not where that has no range for it.
                weighted = x * from_state[:, None]
                rounded = weighted.to(dtype).to(tl.float32)
                weighted = tl.trans(tl.where(tl.abs(weighted) < MIN_ROUNDED, weighted, rounded))
                sums_row = terms.sums_row
                rows = tl.arange(0, parts)[:, None] * (2 * sums_row) + span.slot + start + tl.arange(0, C)[None, :]
                tl.store(terms.sums_ptr + rows, tl.sum(tl.reshape(weighted * read, (parts, PART_ROWS, C)), 1))
                if not EXACT:
                    own = tl.reshape(tl.trans(x).to(tl.float32) * within, (parts, PART_ROWS, C))
                    tl.store(terms.sums_ptr + sums_row + rows, tl.sum(own, 1))
        if SUMS and REVERSE:
            leave(inner_ptr, state)
    if SUMS and WEIGHS and not REVERSE:  # noqa: SIM102  (known, and not known, to the compiler)
        if span.column == 0:
            tl.store(terms.skipped_ptr, tl.sum(skipped, 0))
    return state


@triton.jit
def leave_block(ptr, state, wanted):
    """Stores a state [R, S], if wanted, its elements in a row."""
    S: tl.constexpr = state.shape[1]
    at = tl.arange(0, state.shape[0])[:, None] * S + tl.arange(0, S)[None, :]
    tl.store(ptr + at, state.to(ptr.dtype.element_ty), mask=wanted & (at >= 0))


@triton.jit
def own_pairs(C: tl.constexpr):
    """True for the pair of a token with itself, of all pairs [C, C] of a chunk's."""
    i = tl.arange(0, C)
    return i[:, None] == i[None, :]


@triton.jit
def own_products(products, wanted):
    """The diagonal of all pairs' products [C, C]; zeros unless wanted."""
    C: tl.constexpr = products.shape[0]
    own = tl.zeros((C,), tl.float32)
    if wanted:
        own = tl.sum(tl.where(own_pairs(C), products, 0.0), 1)
    return own


@triton.jit
def read_state(state, a_t, SUMS: tl.constexpr, PRECISION: tl.constexpr):
    """state [BR, BA] a_t [BA, C], which is of the inputs' dtype, in fp32.

    SUMS: whether a decay's gradient is made of it: of sums over tokens little is left but what rounding adds, so with
    fp16 inputs tf32 takes the state in two parts. In bf16 that costs more than it is worth (docs/design/numerics.md).
    """
    if a_t.dtype == tl.bfloat16:
        return tl.dot(state.to(tl.bfloat16), a_t)
    else:
        # A state may exceed fp16's range: its product is taken in fp32 operands (rounded as PRECISION says).
        a_t = a_t.to(tl.float32)
        if SUMS and PRECISION != "ieee":
            high = (state.to(tl.int32, bitcast=True) & TF32_MASK).to(tl.float32, bitcast=True)
            read = tl.dot(state - high, a_t, input_precision=PRECISION)
            return tl.dot(high, a_t, read, input_precision=PRECISION)
        else:
            return tl.dot(state, a_t, input_precision=PRECISION)


@triton.jit
def add_chunk(
    state,
    x_t,
    y,
    to_state,
    total,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    WEIGH_Y: tl.constexpr,  # which of the two is weighted, and so rounded: x_t goes from registers to its product
    PRECISION: tl.constexpr,
):
    """The state, decayed over a chunk, with what its tokens add: x_t [BX, C] y [C, BY], weighted by to_state [C].

    Where a decay's gradient is wanted, k and q are weighted, not v and do: see gate_gradient.
    """
    if not (KIND == NONE and not REVERSE):
        if WEIGH_Y:
            y = (y * to_state[:, None]).to(y.dtype)
        else:
            x_t = (x_t * to_state[None, :]).to(y.dtype)
    return tl.dot(x_t, y, decayed(state, total, y.dtype == tl.float32), input_precision=PRECISION)


@triton.jit
def gather(
    operands,  # these as in `sweep`: the state is the decayed sum of c b^T
    decay,
    state,  # [BC, BA], that the run starts from; if REVERSE, ends in
    span,
    places_ptr,
    T,
    sizes: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    WEIGH_B: tl.constexpr,
    EXACT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHS: tl.constexpr = False,
):
    """The state as a sweep of the whole run has it where it comes to the segment of `span`."""
    A: tl.constexpr = sizes.A
    N: tl.constexpr = sizes.N
    BA: tl.constexpr = sizes.BA
    BC: tl.constexpr = sizes.BC
    C: tl.constexpr = sizes.C
    begin, end = run_bounds(places_ptr, T, PACKED)
    if REVERSE:
        begin = span.last
    else:
        end = span.first
    c_view = view(operands.c_ptr, end, operands.c_row, N, C, BC, DESCRIPTORS)
    b_view = view(operands.b_ptr, end, operands.b_row, A, C, BA, DESCRIPTORS)
    rate = head_rate(decay.g_ptr, KIND)
    chunks = tl.cdiv(end - begin, C)
    for step in range(chunks):
        start = begin + (chunks - 1 - step if REVERSE else step) * C
        length = tl.minimum(end - start, C)
        c_t = tl.trans(load_chunk(c_view, start, span.column, end, operands.c_row, N, C, BC, DESCRIPTORS))
        b = load_chunk(b_view, start, 0, end, operands.b_row, A, C, BA, DESCRIPTORS)
        at = span.slot + start
        _, _, total, _, to_state = chunk_decays(
            decay.prefix_ptr, decay.suffix_ptr, at, rate, length, decay.scale, KIND, C, REVERSE, EXACT, WEIGHS
        )
        state = add_chunk(state, c_t, b, to_state, total, KIND, REVERSE, WEIGH_B, PRECISION)
    return state
