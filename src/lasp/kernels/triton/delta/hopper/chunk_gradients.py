# mypy: ignore-errors
"""Gradients of heads with more than 128 channels or values, chunk by chunk: `gradients` for Hopper.

A program has 128 channels of a segment's chunks. Products over values are made of 64 of them at a time, whose tiles are
asked for three ahead; then what lies between tokens takes its part, as in the sweep for heads of 128.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lasp.kernels.triton.common.decays import TOKEN
from lasp.kernels.triton.delta.hopper.common import (
    PAIRS,
    TOKENS,
    VECTOR,
    WIDE,
    WIDTH,
    afresh,
    ask_vector,
    between_pairs,
    gradient_factors,
    meet,
    segment_of,
    tokens_view,
    write,
)
from lasp.kernels.triton.delta.hopper.gradients import (
    ACROSS,
    D_BETA,
    D_GATE,
    PAIRS_LEFT,
    READS,
    STORED,
    SUMS,
    keep,
    scaled,
    store_sums,
    sums_of,
    whole_of,
)

STAGES = gl.constexpr(3)
ROWS = gl.constexpr(gl.BlockedLayout([1, 32], [8, 4], [8, 1], [1, 0]))  # of a tile whose rows are summed


@gluon.jit
def _ask(
    step,
    wanted,
    start,
    parts: gl.constexpr,
    V: gl.constexpr,
    column,
    here,
    do_view,
    u_view,
    dv_view,
    s_view,
    d_view,
    do_tiles,
    u_tiles,
    dv_tiles,
    s_tiles,
    d_tiles,
):
    """Ask for the tiles of 64 values of a chunk; step: their place in the segment's order."""
    bytes: gl.constexpr = 3 * TOKENS * TOKENS * 2 + 2 * TOKENS * WIDTH * 2
    stage = step % STAGES
    token, value = start + step // parts * TOKENS, step % parts * TOKENS
    barrier = here.index(stage)
    mbarrier.expect(barrier, bytes, wanted)
    tma.async_copy_global_to_shared(do_view, [token, value], barrier, do_tiles.index(stage), wanted)
    tma.async_copy_global_to_shared(u_view, [token, value], barrier, u_tiles.index(stage), wanted)
    tma.async_copy_global_to_shared(dv_view, [token, value], barrier, dv_tiles.index(stage), wanted)
    tma.async_copy_global_to_shared(s_view, [step * TOKENS, column], barrier, s_tiles.index(stage), wanted)
    tma.async_copy_global_to_shared(d_view, [step * TOKENS, column], barrier, d_tiles.index(stage), wanted)


@gluon.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_hopper_chunk_gradients_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    r_ptr,  # not read
    do_ptr,  # [B, T, H_v, V]
    u_ptr,  # [B, T, H_v, V]
    dv_ptr,  # [B, T, H_v, V]
    beta_ptr,  # fp32 [B, H_v, chunks C]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    g_ptr,  # not read
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    suffix_ptr,  # not read
    s_chunks_ptr,  # [B, H_v, chunks, V, K]: S^T at the start of each chunk
    d_chunks_ptr,  # likewise: D^T at the end of each chunk
    dq_ptr,  # [B, T, H_v, K], written
    dk_ptr,  # likewise
    dr_ptr,  # not written
    d_beta_ptr,  # fp32 [B, T, H_v], written
    dg_ptr,  # fp32 [slices, B, T, H_v], written if GATE
    places_ptr,  # int32 [segments, 7] if PACKED
    scale,
    B,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    chunks,
    K: gl.constexpr,
    V: gl.constexpr,
    KIND: gl.constexpr,
    NORMALIZE: gl.constexpr,
    GATE: gl.constexpr,
    PACKED: gl.constexpr,
):
    dtype: gl.constexpr = k_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, WIDTH], dtype)
    parts: gl.constexpr = V // TOKENS
    slices: gl.constexpr = K // WIDTH
    u_tiles = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, TOKENS], layout)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, TOKENS], layout)
    dv_tiles = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, TOKENS], layout)
    s_tiles = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, WIDTH], layout)  # S^T
    d_tiles = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, WIDTH], layout)  # D^T
    q_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], layout)
    z_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, TOKENS], layout)
    m_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, TOKENS], layout)  # m, then sums
    w_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, TOKENS], layout)
    prefixes = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    betas = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    q_lengths = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    k_lengths = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, PAIRS))
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, PAIRS))
    no_pairs = gl.zeros([TOKENS, TOKENS], gl.float32, PAIRS)
    nothing = gl.zeros([TOKENS, WIDTH], gl.float32, WIDE)

    head, batch, start, last, chunk, _border, _ = segment_of(
        gl.program_id(0) // slices, places_ptr, T, H_v, segments, segment_chunks, PACKED
    )  # fmt: skip
    part = gl.program_id(0) % slices
    column = part * WIDTH
    key_head = head // (H_v // H)
    key_row = batch * T * H + key_head
    row = batch * T * H_v + head
    at = (batch * H_v + head) * chunks + chunk
    key_at = (batch * H + key_head) * chunks + chunk
    count = (last - start + TOKENS - 1) // TOKENS
    steps = count * parts
    dq_ptr += row * K + column
    dk_ptr += row * K + column
    d_beta_ptr += row
    dg_ptr += part.to(gl.int64) * B * T * H_v + row

    tiles_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(tiles_here.index(n), 1)
    mbarrier.init(keys_here, 1)
    fence_async_shared()
    meet()
    q_view = tokens_view(q_ptr + key_row * K + column, H * K, last, WIDTH, layout)
    k_view = tokens_view(k_ptr + key_row * K + column, H * K, last, WIDTH, layout)
    do_view = tma.make_tensor_descriptor(do_ptr + row * V, [last, V], [H_v * V, 1], [TOKENS, TOKENS], layout)
    u_view = tma.make_tensor_descriptor(u_ptr + row * V, [last, V], [H_v * V, 1], [TOKENS, TOKENS], layout)
    dv_view = tma.make_tensor_descriptor(dv_ptr + row * V, [last, V], [H_v * V, 1], [TOKENS, TOKENS], layout)
    s_view = tma.make_tensor_descriptor(s_chunks_ptr + at * (V * K), [count * V, K], [K, 1], [TOKENS, WIDTH], layout)
    d_view = tma.make_tensor_descriptor(d_chunks_ptr + at * (V * K), [count * V, K], [K, 1], [TOKENS, WIDTH], layout)
    for n in gl.static_range(STAGES):
        _ask(
            n, n < steps, start, parts, V, column, tiles_here, do_view, u_view, dv_view, s_view, d_view,
            do_tiles, u_tiles, dv_tiles, s_tiles, d_tiles,
        )  # fmt: skip
    ask_vector(betas.index(0), beta_ptr + at * TOKENS, start < last)
    if KIND == TOKEN:
        ask_vector(prefixes.index(0), prefix_ptr + at * TOKENS, start < last)
    if NORMALIZE:
        ask_vector(q_lengths.index(0), q_norms_ptr + key_at * TOKENS, start < last)
        ask_vector(k_lengths.index(0), k_norms_ptr + key_at * TOKENS, start < last)
    async_copy.commit_group()
    first = start
    sums = m_tiles._reinterpret(gl.float32, [SUMS, 2, TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    for c in range(count):
        fence_async_shared()
        async_copy.wait_group(0)
        meet()
        following = start + TOKENS
        mbarrier.expect(keys_here, 2 * TOKENS * WIDTH * 2)
        tma.async_copy_global_to_shared(q_view, [start, 0], keys_here, q_tiles.index(0))
        tma.async_copy_global_to_shared(k_view, [start, 0], keys_here, k_tiles.index(0))
        ahead = (c + 1) & 1
        ask_vector(betas.index(ahead), beta_ptr + (at + 1) * TOKENS, following < last)
        if KIND == TOKEN:
            ask_vector(prefixes.index(ahead), prefix_ptr + (at + 1) * TOKENS, following < last)
        if NORMALIZE:
            ask_vector(q_lengths.index(ahead), q_norms_ptr + (key_at + 1) * TOKENS, following < last)
            ask_vector(k_lengths.index(ahead), k_norms_ptr + (key_at + 1) * TOKENS, following < last)
        async_copy.commit_group()
        prefix, beta = prefixes.index(c & 1), betas.index(c & 1)
        q_norms, k_norms = q_lengths.index(c & 1), k_lengths.index(c & 1)
        if c > 0:
            store_sums(sums, d_beta_ptr, dg_ptr, H_v, start - TOKENS, last, part == 0, GATE)

        z = no_pairs
        m = no_pairs
        dq = nothing
        read = nothing
        written = nothing
        across = gl.zeros([TOKENS], gl.float32, gl.SliceLayout(1, ROWS))
        for step in range(c * parts, (c + 1) * parts):
            stage = step % STAGES
            mbarrier.wait(tiles_here.index(stage), step // STAGES & 1)
            do_tile, dv_tile, s_tile = do_tiles.index(stage), dv_tiles.index(stage), s_tiles.index(stage)
            u_tile, d_tile = u_tiles.index(stage), d_tiles.index(stage)
            z = warpgroup_mma(do_tile, u_tile.permute((1, 0)), z, is_async=True)
            m = warpgroup_mma(dv_tile, u_tile.permute((1, 0)), m, is_async=True)
            dq = warpgroup_mma(do_tile, s_tile, dq, is_async=True)
            read = warpgroup_mma(dv_tile, s_tile, read, is_async=True)
            written = warpgroup_mma(u_tile, d_tile, written, is_async=True)
            if GATE:
                across += gl.sum(s_tile.load(ROWS).to(gl.float32) * d_tile.load(ROWS).to(gl.float32), 1)
            z, m, dq, read, written = warpgroup_mma_wait(0, [z, m, dq, read, written])
            fence_async_shared()
            meet()
            _ask(
                step + STAGES, step + STAGES < steps, first, parts, V, column, tiles_here, do_view, u_view, dv_view,
                s_view, d_view, do_tiles, u_tiles, dv_tiles, s_tiles, d_tiles,
            )  # fmt: skip

        mbarrier.wait(keys_here, c & 1)
        only = afresh(0)
        q_tile, k_tile = q_tiles.index(only), k_tiles.index(only)
        if GATE:
            scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True)
            overlaps = warpgroup_mma(k_tile, k_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True)
        q_read, k_read, to_end, total = gradient_factors(prefix, q_norms, k_norms, scale, KIND, NORMALIZE)
        # u is beta times what was missing, dv beta times its gradient.
        strength = beta.load(gl.SliceLayout(1, PAIRS))
        d_beta = sums_of(gl.where(i[:, None] == j[None, :], m / (strength * strength)[:, None], 0.0))
        z *= between_pairs(prefix, q_norms, k_norms, KIND, NORMALIZE)
        z = gl.where(i[:, None] >= j[None, :], z * scale, 0.0)
        z_tiles.index(0).store(z.to(dtype))
        m *= between_pairs(prefix, k_norms, k_norms, KIND, NORMALIZE)
        m = gl.where(i[:, None] > j[None, :], -m, 0.0)
        m_tiles.index(0).store(m.to(dtype))
        dq *= q_read[:, None]
        if GATE:
            scores, overlaps = warpgroup_mma_wait(0, [scores, overlaps])
            # w, [i, j]: what i reads from an earlier j.
            crossing = gl.where(i[:, None] > j[None, :], z * scores, 0.0) + m * overlaps
            w_tiles.index(0).store(crossing.to(dtype))
            keys = k_tile.load(WIDE).to(gl.float32)
            reads = sums_of(q_tile.load(WIDE).to(gl.float32) * dq) - scaled(sums_of(keys * read), k_read)
            stored = scaled(sums_of(keys * written), to_end)
        dk = written * to_end[:, None] - read * k_read[:, None]
        fence_async_shared()
        meet()
        only = afresh(0)
        q_tile, k_tile, z_tile, m_tile = (
            q_tiles.index(only),
            k_tiles.index(only),
            z_tiles.index(only),
            m_tiles.index(only),
        )
        dq = warpgroup_mma(z_tile, k_tile, dq, is_async=True)
        dk = warpgroup_mma(m_tile, k_tile, dk, is_async=True)
        dk = warpgroup_mma(m_tile.permute((1, 0)), k_tile, dk, is_async=True)
        dk = warpgroup_mma(z_tile.permute((1, 0)), q_tile, dk, is_async=True)
        if GATE:
            t = gl.arange(0, TOKENS, gl.SliceLayout(1, PAIRS_LEFT))[:, None]
            before = gl.arange(0, TOKENS, gl.SliceLayout(0, PAIRS_LEFT))[None, :]
            crossed = warpgroup_mma(
                (before < t).to(dtype), w_tiles.index(only).permute((1, 0)), no_pairs, use_acc=False, is_async=True
            )  # fmt: skip
            dq, dk, crossed = warpgroup_mma_wait(0, [dq, dk, crossed])
        else:
            dq, dk = warpgroup_mma_wait(0, [dq, dk])
        meet()
        keep(sums, D_BETA, d_beta)
        if GATE:
            keep(sums, READS, reads)
            keep(sums, STORED, stored)
            halves = sums._reinterpret(gl.float32, [2 * SUMS, TOKENS], VECTOR)
            halves.index(2 * ACROSS).store(across * gl.exp2(total))
            halves.index(2 * ACROSS + 1).store(across * 0.0)
        write(dq_ptr, dq, H_v * K, start, last)
        write(dk_ptr, dk, H_v * K, start, last)
        if GATE:
            meet()
            of_columns: gl.constexpr = gl.SliceLayout(0, PAIRS)
            reads = whole_of(sums, READS, of_columns)
            stored = whole_of(sums, STORED, of_columns)
            dg = gl.where(j[None, :] >= i[:, None], crossed + reads[None, :], stored[None, :])
            keep(sums, D_GATE, sums_of(dg))
        start = following
        at += 1
        key_at += 1
    if count > 0:
        meet()
        store_sums(sums, d_beta_ptr, dg_ptr, H_v, start - TOKENS, last, part == 0, GATE)
    for n in gl.static_range(STAGES):
        mbarrier.invalidate(tiles_here.index(n))
    mbarrier.invalidate(keys_here)
