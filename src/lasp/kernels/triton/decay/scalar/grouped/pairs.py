# mypy: ignore-errors
"""Pairs of tokens within blocks, of all value heads that share a head of q and k.

    z_ij = scale L_ij (do_i . v_j),   w_ij = z_ij (q_i . k_j)        (L as in `sweep`)

Their sum of z over heads is what dq and dk take of a block: one product each, for all heads. Of w each head's sums over
rows and over columns are taken, of the same numbers: what does not cross a token cancels in them, whatever was rounded.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import load_chunk
from lasp.kernels.triton.decay.scalar.sweep import BLOCK_CHUNKS

# Of a token: sums of w over its row and, in parts, over its column, in its chunk, without itself; likewise in the
# block's other chunk; its own do . v; what it reads from the state, and what it adds to it, times the other's gradient,
# in parts.
KEY_COLUMNS = tl.constexpr(64)
ROW, COLUMN, OTHER, OWN, READS_Q, READS_K, SUMS = (tl.constexpr(n) for n in (0, 1, 5, 9, 10, 12, 14))
# Of a block's pairs of chunks, those that have pairs of tokens.
SQUARES = tl.constexpr(3)


@triton.jit
def rows_view(ptr, rows, row, R: tl.constexpr, N: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Describe so many rows, `row` elements long, to be read in tiles [R, N]."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(ptr, [rows, row], [tl.cast(row, tl.int64), 1], [R, N])
    else:
        return ptr


@triton.jit
def load_rows(source, first, column, rows, row, R: tl.constexpr, N: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """[R, N] of a `rows_view`, from row `first` and column `column` on."""
    if DESCRIPTORS:
        return source.load([first, column])
    else:
        r = tl.arange(0, R)[:, None]
        n = tl.arange(0, N)[None, :]
        place = source + tl.cast(first, tl.int64) * row + column + r * row + n
        return tl.load(place, mask=(first + r < rows) & (n >= 0), other=0.0)


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "chunks", "blocks"])
def group_pairs_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    prefix_ptr,  # fp32 [B, H_v, chunks C]
    suffix_ptr,  # likewise: prefix less weights, if WEIGHS
    pairs_ptr,  # [B, H, blocks, 2 C, 2 C], written but for what lies above the diagonal: sums of z over heads
    sums_ptr,  # fp32 [SUMS, B, H_v, chunks C], written: all but reads
    scores_ptr,  # fp32 [B, H, chunks C], written if WEIGHS: scale q . k of each token's own
    scale,
    B,
    T,
    H,
    H_v,
    chunks,
    blocks,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    """A program for two chunks, that of queries and that of keys."""
    square = tl.program_id(0) % SQUARES
    key_run = tl.cast(tl.program_id(0) // SQUARES, tl.int64)
    batch = key_run // H
    block = tl.program_id(1)
    of_q = block * BLOCK_CHUNKS + (1 if square > 0 else 0)
    of_k = block * BLOCK_CHUNKS + (1 if square == 2 else 0)
    if of_q >= chunks:
        return
    group = H_v // H
    qk = batch * T * H + key_run % H
    q = load_chunk(q_ptr + qk * K, of_q * C, 0, T, H * K, K, C, K, False)
    k = load_chunk(k_ptr + qk * K, of_k * C, 0, T, H * K, K, C, K, False)
    products = tl.dot(q, tl.trans(k))
    t = tl.arange(0, C)
    i = t[:, None]
    j = t[None, :]
    apart = square == 1
    if WEIGHS:
        own = tl.sum(tl.where(i == j, products, 0.0), 1) * scale
        tl.store(scores_ptr + (key_run * chunks + of_q) * C + t, own, mask=(square != 1) & (t >= 0))
    # A token's own pair, and those that are none, are in no sum.
    products = tl.where(apart | (i > j), products * scale, 0.0)
    head = tl.cast(key_run % H, tl.int32) * group
    run = batch * H_v + head
    row = H_v * V
    do_view = rows_view(do_ptr + batch * T * row, T, row, C, V, DESCRIPTORS)
    v_view = rows_view(v_ptr + batch * T * row, T, row, C, V, DESCRIPTORS)
    rows = tl.cast(B, tl.int64) * H_v * chunks * C
    row_ptr = sums_ptr + rows * tl.where(apart, OTHER, ROW) + t
    column_ptr = sums_ptr + rows * tl.where(apart, OTHER, COLUMN) + t
    own_ptr = sums_ptr + rows * OWN + t
    q_slot = (run * chunks + of_q) * C
    k_slot = (run * chunks + of_k) * C
    # Of the next head before this one is worked on: nothing hides the wait for what no product takes.
    prefix = tl.load(prefix_ptr + q_slot + t) + tl.where(apart, tl.load(prefix_ptr + k_slot + C - 1), 0.0)
    before = tl.load(prefix_ptr + k_slot + t)
    added = tl.load(suffix_ptr + k_slot + t)
    total = tl.zeros((C, C), tl.float32)
    for h in range(group):
        do = load_rows(do_view, of_q * C, (head + h) * V, T, row, C, V, DESCRIPTORS)
        v = load_rows(v_view, of_k * C, (head + h) * V, T, row, C, V, DESCRIPTORS)
        # Of pairs that are none it would have no bound; of others a later prefix is the less.
        log2 = tl.minimum(prefix[:, None], before[None, :]) - added[None, :]
        q_here, k_here = q_slot, k_slot
        q_slot += tl.where(h + 1 < group, chunks * C, 0)
        k_slot += tl.where(h + 1 < group, chunks * C, 0)
        prefix = tl.load(prefix_ptr + q_slot + t) + tl.where(apart, tl.load(prefix_ptr + k_slot + C - 1), 0.0)
        before = tl.load(prefix_ptr + k_slot + t)
        added = tl.load(suffix_ptr + k_slot + t)
        d_scores = tl.dot(do, tl.trans(v))
        if WEIGHS:
            own = tl.sum(tl.where(i == j, d_scores, 0.0), 1)
            tl.store(own_ptr + q_here, own, mask=(square != 1) & (t >= 0))
        z = d_scores * tl.exp2(log2)
        total += z
        w = z * products
        tl.store(row_ptr + q_here, tl.sum(w, 1))
        tl.store(column_ptr + k_here, tl.sum(w, 0))
    WIDTH: tl.constexpr = BLOCK_CHUNKS * C
    pairs_ptr += (key_run * blocks + block) * WIDTH * WIDTH
    at = ((of_q - block * BLOCK_CHUNKS) * C + i) * WIDTH + (of_k - block * BLOCK_CHUNKS) * C + j
    total = tl.where(apart | (i >= j), total * scale, 0.0)
    tl.store(pairs_ptr + at, total.to(pairs_ptr.dtype.element_ty))
