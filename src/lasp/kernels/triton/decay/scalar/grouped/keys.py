# mypy: ignore-errors
"""The gradients of q and of k, of all value heads that share a head of them, block by block:

    dq_i = sum_h scale 2^prefix_i do_i S^T + sum_j (sum_h z_ij) k_j        S: the state that enters the block
    dk_j = sum_h       2^suffix_j v_j D^T  + sum_i (sum_h z_ij) q_i        D: the gradient of that which leaves it

and of each head q_i and k_j times what comes of states, and <S, D> across the block (see `gate_gradient`).
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import load_chunk, store_chunk, view
from lasp.kernels.triton.decay.scalar.grouped.pairs import KEY_COLUMNS, READS_K, READS_Q, load_rows, rows_view
from lasp.kernels.triton.decay.scalar.sweep import BLOCK_CHUNKS


@triton.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "chunks", "blocks"])
def group_keys_kernel(
    x_ptr,  # [B, T, H, K]: q, or k if REVERSE
    other_ptr,  # likewise, the other one
    rows_ptr,  # [B, T, H_v, V]: do, or v if REVERSE
    prefix_ptr,  # fp32 [B, H_v, chunks C]
    suffix_ptr,  # likewise: prefix less weights, if there are any
    pairs_ptr,  # [B, H, blocks, 2 C, 2 C], on and below the diagonal: sums of z over heads
    states_ptr,  # [B, H_v, blocks, V, K]: S^T, or D^T if REVERSE
    others_ptr,  # likewise S^T; read if REVERSE
    dx_ptr,  # [B, T, H, K], written
    sums_ptr,  # fp32 [SUMS, B, H_v, chunks C], reads are written
    across_ptr,  # fp32 [parts, B, H_v, blocks], written if REVERSE
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
    REVERSE: tl.constexpr,
):
    """A program for some columns of a block."""
    L: tl.constexpr = BLOCK_CHUNKS * C
    BK: tl.constexpr = KEY_COLUMNS
    part = tl.program_id(0) % (K // BK)
    key_run = tl.cast(tl.program_id(0) // (K // BK), tl.int64)
    column = part * BK
    batch = key_run // H
    block = tl.program_id(1)
    group = H_v // H
    head = tl.cast(key_run % H, tl.int32) * group
    run = batch * H_v + head
    start = block * L
    qk = batch * T * H + key_run % H
    t = tl.arange(0, L)
    x = load_chunk(x_ptr + qk * K, start, column, T, H * K, K, L, BK, False)
    other = load_chunk(other_ptr + qk * K, start, column, T, H * K, K, L, BK, False)
    # Rows that there are not were not written either.
    below = (t[:, None] >= t[None, :]) & (start + t < T)[:, None]
    pairs = tl.load(
        pairs_ptr + (key_run * blocks + block) * (L * L) + t[:, None] * L + t[None, :], mask=below, other=0.0
    )
    dx = tl.dot(tl.trans(pairs) if REVERSE else pairs, other)
    row = H_v * V
    of_tokens = rows_view(rows_ptr + batch * T * row, T, row, L, V, DESCRIPTORS)
    count = B * H_v * blocks * V
    states = rows_view(states_ptr, count, K, V, BK, DESCRIPTORS)
    others = rows_view(others_ptr, count, K, V, BK, DESCRIPTORS)
    across_ptr += part * tl.cast(B, tl.int64) * H_v * blocks
    slots = chunks * C
    late = t >= C
    here = run * slots + start
    inside = start + t < slots
    sums_ptr += ((READS_K if REVERSE else READS_Q) + part) * tl.cast(B, tl.int64) * H_v * slots + t
    # Of the next head before this one is worked on: nothing hides the wait for what no product takes.
    sums = tl.load((suffix_ptr if REVERSE else prefix_ptr) + here + t, mask=inside, other=0.0)
    first = tl.load(prefix_ptr + here + C - 1)
    second = tl.load(prefix_ptr + here + L - 1, mask=start + L <= slots, other=0.0)
    for h in range(group):
        index = (run + h) * blocks + block
        rows = load_rows(of_tokens, start, (head + h) * V, T, row, L, V, DESCRIPTORS)
        state = load_rows(states, tl.cast(index * V, tl.int32), column, count, K, V, BK, DESCRIPTORS)
        log2 = sums + tl.where(late, first, 0.0)
        total = first + second
        factors = tl.exp2(total - log2) if REVERSE else tl.exp2(log2) * scale
        at = here
        here += tl.where(h + 1 < group, slots, 0)
        sums = tl.load((suffix_ptr if REVERSE else prefix_ptr) + here + t, mask=inside, other=0.0)
        first = tl.load(prefix_ptr + here + C - 1)
        second = tl.load(prefix_ptr + here + L - 1, mask=start + L <= slots, other=0.0)
        read = tl.dot(rows, state)
        dx += read * factors[:, None]
        tl.store(sums_ptr + at, tl.sum(x.to(tl.float32) * read, 1) * factors, mask=inside)
        if REVERSE:
            before = load_rows(others, tl.cast(index * V, tl.int32), column, count, K, V, BK, DESCRIPTORS)
            passed = tl.sum(state.to(tl.float32) * before.to(tl.float32))
            # Triton loads ahead only what a product takes.
            passed += tl.sum(tl.dot(before, tl.zeros((BK, 16), before.dtype)))
            tl.store(across_ptr + index, passed * tl.exp2(total))
    out = view(dx_ptr + qk * K, T, H * K, K, L, BK, False)
    store_chunk(out, dx.to(dx_ptr.dtype.element_ty), start, column, T, H * K, K, L, BK, False)
