# mypy: ignore-errors
"""The gradients of gates, and of weights, of sums that `group_pairs` and `group_keys` left of each token and head:

    d_g_t = across + sum_{i >= t} reads_q_i + sum_{j < t} reads_k_j + sum_{i >= t > j} w_ij,        i, j in t's block

The last is a difference of sums over rows and over columns of the same w.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.decay.scalar.grouped.pairs import COLUMN, OTHER, OWN, READS_K, READS_Q, ROW
from lasp.kernels.triton.decay.scalar.sweep import BLOCK_CHUNKS


@triton.jit(do_not_specialize=["B", "T", "H", "H_v", "chunks", "blocks"])
def group_gates_kernel(
    sums_ptr,  # fp32 [SUMS, B, H_v, chunks C]
    across_ptr,  # fp32 [PARTS, B, H_v, blocks]
    prefix_ptr,  # fp32 [B, H_v, chunks C]; read if WEIGHS, so are the next two
    suffix_ptr,  # likewise: prefix less weights
    scores_ptr,  # fp32 [B, H, chunks C]: scale q . k of each token's own
    dg_ptr,  # fp32 [B, T, H_v], written
    dw_ptr,  # likewise, if WEIGHS: the gradient of the logarithms of tokens' weights, k . dk
    skipped_ptr,  # fp32 [B, H_v, blocks], likewise: sums of do . v
    B,
    T,
    H,
    H_v,
    chunks,
    blocks,
    C: tl.constexpr,
    PARTS: tl.constexpr,  # of reads and of across
    COLUMN_PARTS: tl.constexpr,  # of sums over columns
    HEADS: tl.constexpr,  # that a program has
    WEIGHS: tl.constexpr,
):
    L: tl.constexpr = BLOCK_CHUNKS * C
    block = tl.program_id(0)
    groups = tl.cdiv(H_v, HEADS)
    batch = tl.cast(tl.program_id(1) // groups, tl.int64)
    head = tl.program_id(1) % groups * HEADS + tl.arange(0, HEADS)[None, :]
    t = tl.arange(0, L)[:, None]
    start = block * L
    inside = (start + t < T) & (head < H_v)
    rows = tl.cast(B, tl.int64) * H_v * chunks * C
    slots = (batch * H_v + head) * chunks * C + start + t
    sums_ptr += slots
    reads_q = tl.load(sums_ptr + READS_Q * rows, mask=inside, other=0.0)
    # Of the token before: large as one's own may be, it is not in the sum, and not taken off again.
    reads_k = tl.load(sums_ptr + READS_K * rows - 1, mask=inside & (t > 0), other=0.0)
    row = tl.load(sums_ptr + ROW * rows, mask=inside, other=0.0)
    column = tl.load(sums_ptr + COLUMN * rows, mask=inside, other=0.0)
    # Of the run's last chunk, if it is its block's first, there is no other.
    whole = (block + 1) * BLOCK_CHUNKS <= chunks
    other = tl.load(sums_ptr + OTHER * rows, mask=inside & whole, other=0.0)
    row += tl.where(t >= C, other, 0.0)
    column += tl.where(t < C, other, 0.0)
    for part in tl.static_range(1, COLUMN_PARTS):
        column += tl.load(sums_ptr + (COLUMN + part) * rows, mask=inside, other=0.0)
        column += tl.load(sums_ptr + (OTHER + part) * rows, mask=inside & whole & (t < C), other=0.0)
    across_ptr += (batch * H_v + head) * blocks + block
    across = tl.load(across_ptr, mask=head < H_v, other=0.0)
    if PARTS > 1:
        reads_q += tl.load(sums_ptr + (READS_Q + 1) * rows, mask=inside, other=0.0)
        reads_k += tl.load(sums_ptr + (READS_K + 1) * rows - 1, mask=inside & (t > 0), other=0.0)
        across += tl.load(across_ptr + tl.cast(B, tl.int64) * H_v * blocks, mask=head < H_v, other=0.0)
    later = tl.cumsum(reads_q, 0, reverse=True)
    earlier = tl.cumsum(reads_k, 0)
    # No pair crosses a block's first token.
    crossing = tl.where(t == 0, 0.0, tl.cumsum(row - column, 0, reverse=True))
    token = (batch * T + start + t) * H_v + head
    tl.store(dg_ptr + token, across + later + earlier + crossing, mask=inside)
    if WEIGHS:
        reads_k = tl.load(sums_ptr + READS_K * rows, mask=inside, other=0.0)
        if PARTS > 1:
            reads_k += tl.load(sums_ptr + (READS_K + 1) * rows, mask=inside, other=0.0)
        own = tl.load(sums_ptr + OWN * rows, mask=inside, other=0.0)
        weight = tl.load(prefix_ptr + slots, mask=inside, other=0.0)
        weight = tl.exp2(weight - tl.load(suffix_ptr + slots, mask=inside, other=0.0))
        key_slots = (batch * H + head // (H_v // H)) * chunks * C + start + t
        score = tl.load(scores_ptr + key_slots, mask=inside, other=0.0)
        tl.store(dw_ptr + token, reads_k + column + own * weight * score, mask=inside)
        of_sum = tl.program_id(1) % groups * HEADS + tl.arange(0, HEADS)
        tl.store(skipped_ptr + (batch * H_v + of_sum) * blocks + block, tl.sum(own, 0), mask=of_sum < H_v)
