# mypy: ignore-errors
"""`gradients` for Hopper, in Triton's lower language: heads of 128 channels and 128 values, bf16.

The same sums in the same roundings as `gradients`, whose legend holds. A program goes from chunk to chunk. Every tile
has a place of its own in shared memory, and the next one for a place is asked for when the last product that reads the
place is done; products that do not need one another are in flight together. What lies between tokens is made once: its
transpose is read from shared memory.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from lasp.kernels.triton.common.decays import TOKEN
from lasp.kernels.triton.delta.hopper import (
    NARROW,
    TOKENS,
    WIDE,
    WIDTH,
    ask_state,
    ask_tokens,
    chunk_of,
    meet,
    write,
)


@gluon.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "chunks", "programs"])
def delta_hopper_gradients_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    do_ptr,  # [B, T, H_v, V]
    u_ptr,  # [B, T, H_v, V]
    dv_ptr,  # [B, T, H_v, V]
    beta_ptr,  # fp32 [B, H_v, chunks C]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    s_chunks_ptr,  # [B, H_v, chunks, V, K]: S^T at the start of each chunk
    d_chunks_ptr,  # likewise: D^T at the end of each chunk
    met_ptr,  # fp32 [B, H_v, chunks, SLICES] if GATE: <S, D> of slices of V
    dq_ptr,  # [B, T, H_v, K], written
    dk_ptr,  # likewise
    d_beta_ptr,  # fp32 [B, T, H_v], written
    dg_ptr,  # fp32 [B, T, H_v], written if GATE
    places_ptr,  # int32 [chunks, 3] if PACKED
    scale,
    B,
    T,
    H,
    H_v,
    chunks,
    programs,
    KIND: gl.constexpr,
    NORMALIZE: gl.constexpr,
    GATE: gl.constexpr,
    SLICES: gl.constexpr,
    PACKED: gl.constexpr,
):
    dtype: gl.constexpr = k_ptr.dtype.element_ty
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, WIDTH], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, TOKENS], dtype)
    u_tile = gl.allocate_shared_memory(dtype, [TOKENS, WIDTH], tile)
    x_tile = gl.allocate_shared_memory(dtype, [TOKENS, WIDTH], tile)  # do, then dv
    q_tile = gl.allocate_shared_memory(dtype, [TOKENS, WIDTH], tile)
    k_tile = gl.allocate_shared_memory(dtype, [TOKENS, WIDTH], tile)
    s_tile = gl.allocate_shared_memory(dtype, [WIDTH, WIDTH], tile)  # S^T, then D^T
    z_tile = gl.allocate_shared_memory(dtype, [TOKENS, TOKENS], square)
    m_tile = gl.allocate_shared_memory(dtype, [TOKENS, TOKENS], square)
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, NARROW))
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, NARROW))
    wide_i = gl.arange(0, TOKENS, gl.SliceLayout(1, WIDE))
    no_pairs = gl.zeros([TOKENS, TOKENS], gl.float32, NARROW)
    nothing = gl.zeros([TOKENS, WIDTH], gl.float32, WIDE)

    heads = B * H_v
    end = heads * chunks
    item = gl.program_id(0)
    _, start, last, at, key_row, row, key_at = chunk_of(item, end, places_ptr, T, H, H_v, chunks, PACKED)
    ask_tokens(u_tile, u_ptr, 0, row, H_v, start, last)
    ask_tokens(x_tile, do_ptr, 0, row, H_v, start, last)
    ask_tokens(q_tile, q_ptr, 0, key_row, H, start, last)
    ask_tokens(k_tile, k_ptr, 0, key_row, H, start, last)
    async_copy.commit_group()
    ask_state(s_tile, s_chunks_ptr, 0, at, item < end)
    async_copy.commit_group()
    for _ in range((end - item + programs - 1) // programs):
        if KIND == TOKEN:
            total = gl.load(prefix_ptr + at * TOKENS + TOKENS - 1)
            wide_prefix = gl.load(prefix_ptr + at * TOKENS + wide_i)
            from_start = gl.exp2(wide_prefix)
            to_end = gl.exp2(total - wide_prefix)
        else:
            total = 0.0
            from_start = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(1, WIDE))
            to_end = from_start
        q_read = from_start * scale
        k_read = from_start
        if NORMALIZE:
            wide_norms = gl.load(k_norms_ptr + key_at * TOKENS + wide_i)
            q_read *= gl.load(q_norms_ptr + key_at * TOKENS + wide_i)
            k_read = from_start * wide_norms
            to_end *= wide_norms
        async_copy.wait_group(1)
        fence_async_shared()
        meet()
        z = warpgroup_mma(x_tile, u_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True)
        pairs = _between(prefix_ptr + at * TOKENS, q_norms_ptr + key_at * TOKENS, k_norms_ptr + key_at * TOKENS, i, j,
                         KIND, NORMALIZE)
        z = warpgroup_mma_wait(0, [z])
        z = gl.where(i[:, None] >= j[None, :], z * scale * pairs, 0.0)
        z = z.to(dtype)
        z_tile.store(z)
        async_copy.wait_group(0)
        fence_async_shared()
        meet()
        dq = warpgroup_mma(x_tile, s_tile, nothing, use_acc=False, is_async=True)
        dq = warpgroup_mma_wait(0, [dq])
        meet()
        ask_tokens(x_tile, dv_ptr, 0, row, H_v, start, last)
        async_copy.commit_group()
        dq *= q_read[:, None]
        if GATE:
            reads = gl.sum(q_tile.load(WIDE).to(gl.float32) * dq, 1)
        dq = warpgroup_mma(gl.convert_layout(z, gl.DotOperandLayout(0, WIDE, 2)), k_tile, dq, is_async=True)
        dq = warpgroup_mma_wait(0, [dq])
        write(dq_ptr, dq, 0, row, H_v, start, last)

        async_copy.wait_group(0)
        fence_async_shared()
        meet()
        m = warpgroup_mma(x_tile, u_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True)
        if GATE:
            q_scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True)
            k_scores = warpgroup_mma(k_tile, k_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True)
            m, q_scores, k_scores = warpgroup_mma_wait(0, [m, q_scores, k_scores])
        else:
            m = warpgroup_mma_wait(0, [m])
        # Made again, lest it be kept meanwhile.
        pairs = _between(prefix_ptr + at * TOKENS, k_norms_ptr + key_at * TOKENS, k_norms_ptr + key_at * TOKENS, i, j,
                         KIND, NORMALIZE)
        # u is beta times what was missing, dv beta times its gradient.
        beta = gl.load(beta_ptr + at * TOKENS + i)
        d_beta = gl.sum(gl.where(i[:, None] == j[None, :], m, 0.0), 1) / beta / beta
        gl.store(d_beta_ptr + row + (start + i).to(gl.int64) * H_v, d_beta, mask=start + i < last)
        m = gl.where(i[:, None] > j[None, :], -m * pairs, 0.0)
        if GATE:
            # [i, j]: what i reads from an earlier j.
            crossing = gl.where(i[:, None] > j[None, :], z_tile.load(NARROW).to(gl.float32) * q_scores, 0.0)
            crossing += m * k_scores
            gained = gl.sum(crossing, 0)
            lost = gl.sum(crossing, 1)
        m = m.to(dtype)
        m_tile.store(m)
        fence_async_shared()
        read = warpgroup_mma(x_tile, s_tile, nothing, use_acc=False, is_async=True)
        read = warpgroup_mma_wait(0, [read])
        meet()
        item += programs
        _, next_start, next_last, next_at, next_key_row, next_row, next_key_at = chunk_of(
            item, end, places_ptr, T, H, H_v, chunks, PACKED
        )
        ask_state(s_tile, d_chunks_ptr, 0, at, True)
        async_copy.commit_group()
        ask_tokens(x_tile, do_ptr, 0, next_row, H_v, next_start, next_last)
        async_copy.commit_group()
        read *= -k_read[:, None]
        if GATE:
            reads += gl.sum(k_tile.load(WIDE).to(gl.float32) * read, 1)
        dk = warpgroup_mma(gl.convert_layout(m, gl.DotOperandLayout(0, WIDE, 2)), k_tile, read, is_async=True)
        dk = warpgroup_mma(m_tile.permute((1, 0)), k_tile, dk, is_async=True)
        dk = warpgroup_mma(z_tile.permute((1, 0)), q_tile, dk, is_async=True)
        dk = warpgroup_mma_wait(0, [dk])
        async_copy.wait_group(1)
        fence_async_shared()
        meet()
        written = warpgroup_mma(u_tile, s_tile, nothing, use_acc=False, is_async=True)
        if GATE:
            keys = k_tile.load(WIDE)
        written = warpgroup_mma_wait(0, [written])
        meet()
        ask_tokens(u_tile, u_ptr, 0, next_row, H_v, next_start, next_last)
        ask_tokens(k_tile, k_ptr, 0, next_key_row, H, next_start, next_last)
        ask_tokens(q_tile, q_ptr, 0, next_key_row, H, next_start, next_last)
        async_copy.commit_group()
        ask_state(s_tile, s_chunks_ptr, 0, next_at, item < end)
        async_copy.commit_group()
        written *= to_end[:, None]
        if GATE:
            # Pairs on both sides of a token, what later ones read from S, what earlier ones write to D, and <S, D>.
            stored = gl.convert_layout(gl.sum(keys.to(gl.float32) * written, 1), gl.SliceLayout(1, NARROW)) - lost
            gained += gl.convert_layout(stored, gl.SliceLayout(0, NARROW))
            reads = gl.convert_layout(reads, gl.SliceLayout(0, NARROW))
            dg = gl.sum(gl.where(j[None, :] < i[:, None], gained[None, :], reads[None, :]), 1)
            across = 0.0
            for part in gl.static_range(SLICES):
                across += gl.load(met_ptr + at * SLICES + part)
            dg += across * tl.exp2(total)
            gl.store(dg_ptr + row + (start + i).to(gl.int64) * H_v, dg, mask=start + i < last)
        write(dk_ptr, dk + written, 0, row, H_v, start, last)
        start, last, at, key_row, row, key_at = (
            next_start, next_last, next_at, next_key_row, next_row, next_key_at
        )  # fmt: skip
    async_copy.wait_group(0)


@gluon.jit
def _between(prefix_ptr, row_norms_ptr, norms_ptr, i, j, KIND: gl.constexpr, NORMALIZE: gl.constexpr):
    """[TOKENS, TOKENS]: the decay from token j to a later i, and both their lengths. Of earlier i it may be infinite."""
    if KIND == TOKEN:
        pairs = gl.exp2(gl.load(prefix_ptr + i)[:, None] - gl.load(prefix_ptr + j)[None, :])
    else:
        pairs = gl.full([TOKENS, TOKENS], 1.0, gl.float32, NARROW)
    if NORMALIZE:
        pairs *= gl.load(row_norms_ptr + i)[:, None] * gl.load(norms_ptr + j)[None, :]
    return pairs
