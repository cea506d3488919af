# mypy: ignore-errors
"""`states` and `gradients` in one sweep for Hopper, in Triton's lower language: heads of 128 channels and 128 values, bf16.

The sums and roundings are those of `gradients`, whose legend holds, but for what crosses a token within its chunk. That
is here a product of w_ij, rounded, with a matrix of ones, and nothing in it cancels. A program has half of the channels
of a segment. S stays in its registers and is written nowhere. Every tile has a place in shared memory, and what goes
there next is asked for when the last product that reads it is done; products that do not need one another are in
flight together. What lies between tokens is made once: its transpose is read from shared memory.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lasp.kernels.triton.common.decays import TOKEN
from lasp.kernels.triton.delta.hopper import (
    AS_LEFT,
    NARROW,
    PART,
    PARTS,
    TOKENS,
    WIDTH,
    afresh,
    meet,
    segment_of,
    tokens_view,
    write,
)


@gluon.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_hopper_gradients4_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    do_ptr,  # [B, T, H_v, V]
    u_ptr,  # [B, T, H_v, V]
    dv_ptr,  # [B, T, H_v, V]
    beta_ptr,  # fp32 [B, H_v, chunks C]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    d_chunks_ptr,  # [B, H_v, chunks, V, K]: D^T at the end of each chunk
    dq_ptr,  # [B, T, H_v, K], written
    dk_ptr,  # likewise
    d_beta_ptr,  # fp32 [B, T, H_v], written
    dg_ptr,  # fp32 [PARTS, B, T, H_v], written if GATE
    places_ptr,  # int32 [segments, 7] if PACKED
    entering_ptr,  # fp32 [B, H_v, segments, K, V], or None for zero
    scale,
    B,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    chunks,
    KIND: gl.constexpr,
    NORMALIZE: gl.constexpr,
    GATE: gl.constexpr,
    WHOLE: gl.constexpr,  # whether runs are single segments, and what enters them is given for each run
    PACKED: gl.constexpr,
):
    dtype: gl.constexpr = k_ptr.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, WIDTH], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, PART], dtype)
    u_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], wide)
    do_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], wide)
    dv_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], wide)
    q_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, PART], narrow)
    k_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, PART], narrow)
    s_tiles = gl.allocate_shared_memory(dtype, [1, WIDTH, PART], narrow)  # S^T
    d_tiles = gl.allocate_shared_memory(dtype, [1, WIDTH, PART], narrow)  # D^T
    z_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, TOKENS], narrow)  # z, then w
    m_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, TOKENS], narrow)
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, NARROW))
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, NARROW))
    u_column = gl.arange(0, TOKENS, gl.SliceLayout(0, AS_LEFT))
    nothing = gl.zeros([TOKENS, PART], gl.float32, NARROW)

    part = gl.program_id(0) % PARTS
    head, batch, start, last, chunk, border, _ = segment_of(
        gl.program_id(0) // PARTS, places_ptr, T, H_v, segments, segment_chunks, PACKED
    )
    column = part * PART
    key_head = head // (H_v // H)
    key_row = batch * T * H + key_head
    row = batch * T * H_v + head
    at = (batch * H_v + head) * chunks + chunk
    key_at = (batch * H + key_head) * chunks + chunk
    dg_ptr += part.to(gl.int64) * B * T * H_v

    state = gl.zeros([WIDTH, PART], gl.float32, NARROW)
    if entering_ptr is not None:
        source = border if WHOLE else (batch * H_v + head) * segments + gl.program_id(1)
        r = gl.arange(0, WIDTH, gl.SliceLayout(1, NARROW))
        d = column + gl.arange(0, PART, gl.SliceLayout(0, NARROW))
        state = gl.load(entering_ptr + source * WIDTH * WIDTH + (r[:, None] + d[None, :] * WIDTH))
    # Each is of tiles that are waited for together.
    do_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    tokens_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    d_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(do_here, 1)
    mbarrier.init(tokens_here, 1)
    mbarrier.init(d_here, 1)
    fence_async_shared()
    meet()
    do_view = tokens_view(do_ptr, row, H_v, last, wide)
    dv_view = tokens_view(dv_ptr, row, H_v, last, wide)
    u_view = tokens_view(u_ptr, row, H_v, last, wide)
    q_view = tma.make_tensor_descriptor(q_ptr + key_row * WIDTH, [last, WIDTH], [H * WIDTH, 1], [TOKENS, PART], narrow)
    k_view = tma.make_tensor_descriptor(k_ptr + key_row * WIDTH, [last, WIDTH], [H * WIDTH, 1], [TOKENS, PART], narrow)
    count = (last - start + TOKENS - 1) // TOKENS
    d_view = tma.make_tensor_descriptor(
        d_chunks_ptr + at * (WIDTH * WIDTH), [count * WIDTH, WIDTH], [WIDTH, 1], [WIDTH, PART], narrow
    )
    mbarrier.expect(do_here, TOKENS * WIDTH * 2, start < last)
    tma.async_copy_global_to_shared(do_view, [start, 0], do_here, do_tiles.index(0), start < last)
    mbarrier.expect(tokens_here, 2 * TOKENS * (WIDTH + PART) * 2, start < last)
    tma.async_copy_global_to_shared(u_view, [start, 0], tokens_here, u_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(k_view, [start, column], tokens_here, k_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(q_view, [start, column], tokens_here, q_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(dv_view, [start, 0], tokens_here, dv_tiles.index(0), start < last)
    mbarrier.expect(d_here, WIDTH * PART * 2, start < last)
    tma.async_copy_global_to_shared(d_view, [0, column], d_here, d_tiles.index(0), start < last)
    for c in range(count):
        s_tiles.index(0).store(state.to(dtype))
        fence_async_shared()
        mbarrier.wait(do_here, c & 1)
        mbarrier.wait(tokens_here, c & 1)
        meet()
        only = afresh(0)
        do_tile = do_tiles.index(only)
        u_tile = u_tiles.index(only)
        s_tile = s_tiles.index(only)
        q_tile = q_tiles.index(only)
        k_tile = k_tiles.index(only)
        z = warpgroup_mma(do_tile, u_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dq = warpgroup_mma(do_tile, s_tile, nothing, use_acc=False, is_async=True)
        from_start = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(1, NARROW))
        to_end = from_start
        total = 0.0
        if KIND == TOKEN:
            prefix = gl.load(prefix_ptr + at * TOKENS + i)
            total = gl.load(prefix_ptr + at * TOKENS + TOKENS - 1)
            from_start = gl.exp2(prefix)
            to_end = gl.exp2(total - prefix)
        q_read = from_start * scale
        k_read = from_start
        if NORMALIZE:
            q_norms = gl.load(q_norms_ptr + key_at * TOKENS + i)
            k_norms = gl.load(k_norms_ptr + key_at * TOKENS + i)
            q_read *= q_norms
            k_read *= k_norms
            to_end *= k_norms
        z, dq = warpgroup_mma_wait(0, [z, dq])
        if GATE:
            scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        # Of earlier i a decay may be infinite: it is replaced, not multiplied.
        if KIND == TOKEN:
            z *= gl.exp2(prefix[:, None] - gl.load(prefix_ptr + at * TOKENS + j)[None, :])
        if NORMALIZE:
            z *= q_norms[:, None] * gl.load(k_norms_ptr + key_at * TOKENS + j)[None, :]
        z = gl.where(i[:, None] >= j[None, :], z * scale, 0.0)
        dq *= q_read[:, None]
        if GATE:
            # w, [i, j]: what i reads from an earlier j.
            scores = warpgroup_mma_wait(0, [scores])
            crossing = gl.where(i[:, None] > j[None, :], z * scores, 0.0)
            reads = gl.sum(q_tile.load(NARROW).to(gl.float32) * dq, 1)
        z_tiles.index(0).store(z.to(dtype))
        fence_async_shared()
        meet()
        start += TOKENS
        mbarrier.expect(do_here, TOKENS * WIDTH * 2, start < last)
        tma.async_copy_global_to_shared(do_view, [start, 0], do_here, do_tiles.index(0), start < last)
        only = afresh(0)
        z_tile = z_tiles.index(only)
        k_tile = k_tiles.index(only)
        q_tile = q_tiles.index(only)
        dv_tile = dv_tiles.index(only)
        u_tile = u_tiles.index(only)
        dq = warpgroup_mma(z_tile, k_tile, dq, is_async=True)
        dk = warpgroup_mma(z_tile.permute((1, 0)), q_tile, nothing, use_acc=False, is_async=True)
        m = warpgroup_mma(dv_tile, u_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dq, dk, m = warpgroup_mma_wait(0, [dq, dk, m])
        if GATE:
            scores = warpgroup_mma(k_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        write(dq_ptr, dq, column, row, H_v, start - TOKENS, last)
        if part == 0:
            # u is beta times what was missing, dv beta times its gradient.
            beta = gl.load(beta_ptr + at * TOKENS + i)
            d_beta = gl.sum(gl.where(i[:, None] == j[None, :], m, 0.0), 1) / beta / beta
            t = start - TOKENS + i
            gl.store(d_beta_ptr + row + t.to(gl.int64) * H_v, d_beta, mask=t < last)
        if KIND == TOKEN:
            m *= gl.exp2(prefix[:, None] - gl.load(prefix_ptr + at * TOKENS + j)[None, :])
        if NORMALIZE:
            m *= k_norms[:, None] * gl.load(k_norms_ptr + key_at * TOKENS + j)[None, :]
        m = gl.where(i[:, None] > j[None, :], -m, 0.0)
        if GATE:
            scores = warpgroup_mma_wait(0, [scores])
            crossing += m * scores
            meet()
            z_tiles.index(0).store(crossing.to(dtype))
        m_tiles.index(0).store(m.to(dtype))
        fence_async_shared()
        mbarrier.wait(d_here, c & 1)
        meet()
        only = afresh(0)
        dv_tile = dv_tiles.index(only)
        s_tile = s_tiles.index(only)
        k_tile = k_tiles.index(only)
        m_tile = m_tiles.index(only)
        d_tile = d_tiles.index(only)
        read = warpgroup_mma(dv_tile, s_tile, nothing, use_acc=False, is_async=True)
        dk = warpgroup_mma(m_tile, k_tile, dk, is_async=True)
        dk = warpgroup_mma(m_tile.permute((1, 0)), k_tile, dk, is_async=True)
        if GATE:
            across = gl.sum(gl.sum(state * d_tile.load(NARROW).to(gl.float32), 1), 0) * gl.exp2(total)
        read, dk = warpgroup_mma_wait(0, [read, dk])
        read *= -k_read[:, None]
        dk += read
        if GATE:
            reads += gl.sum(k_tile.load(NARROW).to(gl.float32) * read, 1)
        only = afresh(0)
        u_tile = u_tiles.index(only)
        d_tile = d_tiles.index(only)
        k_tile = k_tiles.index(only)
        written = warpgroup_mma(u_tile, d_tile, nothing, use_acc=False, is_async=True)
        # Rounded before it decays, as forward had it.
        u_to_end = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(0, AS_LEFT))
        if KIND == TOKEN:
            u_to_end = gl.exp2(total - gl.load(prefix_ptr + at * TOKENS + u_column))
        if NORMALIZE:
            u_to_end *= gl.load(k_norms_ptr + key_at * TOKENS + u_column)
        weighted = (u_tile.permute((1, 0)).load(AS_LEFT).to(gl.float32) * u_to_end[None, :]).to(dtype)
        state *= gl.exp2(total)
        state = warpgroup_mma(weighted, k_tile, state, is_async=True)
        written, state = warpgroup_mma_wait(0, [written, state])
        written *= to_end[:, None]
        if GATE:
            stored = gl.sum(k_tile.load(NARROW).to(gl.float32) * written, 1)
        dk += written
        meet()
        mbarrier.expect(tokens_here, 2 * TOKENS * (WIDTH + PART) * 2, start < last)
        tma.async_copy_global_to_shared(u_view, [start, 0], tokens_here, u_tiles.index(0), start < last)
        tma.async_copy_global_to_shared(k_view, [start, column], tokens_here, k_tiles.index(0), start < last)
        tma.async_copy_global_to_shared(q_view, [start, column], tokens_here, q_tiles.index(0), start < last)
        tma.async_copy_global_to_shared(dv_view, [start, 0], tokens_here, dv_tiles.index(0), start < last)
        mbarrier.expect(d_here, WIDTH * PART * 2, start < last)
        tma.async_copy_global_to_shared(d_view, [(c + 1) * WIDTH, column], d_here, d_tiles.index(0), start < last)
        if GATE:
            z_tile = z_tiles.index(afresh(0))
            before = gl.convert_layout((j[None, :] < i[:, None]).to(dtype), AS_LEFT)
            crossed = warpgroup_mma(before, z_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            reads = gl.convert_layout(reads, gl.SliceLayout(0, NARROW))
            stored = gl.convert_layout(stored, gl.SliceLayout(0, NARROW))
            crossed = warpgroup_mma_wait(0, [crossed])
            dg = gl.where(j[None, :] >= i[:, None], crossed + reads[None, :], stored[None, :])
            t = start - TOKENS + i
            gl.store(dg_ptr + row + t.to(gl.int64) * H_v, gl.sum(dg, 1) + across, mask=t < last)
        write(dk_ptr, dk, column, row, H_v, start - TOKENS, last)
        at += 1
        key_at += 1
    mbarrier.invalidate(do_here)
    mbarrier.invalidate(tokens_here)
    mbarrier.invalidate(d_here)
