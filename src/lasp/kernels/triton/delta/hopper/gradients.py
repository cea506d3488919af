# mypy: ignore-errors
"""Sweep over segments for what `states` and `gradients` make elsewhere; the legend is that of `gradients`.

S stays in registers, and is written nowhere. What crosses a token t within its chunk is a product of w_ij, rounded,
with a matrix of ones,

    sum_{i >= t > j} w_ij = sum_{i >= t} (w 1_{j < t})_it

in which nothing cancels. What lies between tokens is made once: its transpose is read from shared memory.
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
    STATE,
    STATE_LEFT,
    TOKENS,
    VECTOR,
    WIDE,
    WIDTH,
    afresh,
    ask_vector,
    between_pairs,
    chunk_gradient_view,
    gradient_factors,
    meet,
    segment_of,
    tokens_view,
    write,
)

# Sums over rows, each of what either half of the warps has; in shared memory.
READS, STORED, D_BETA, D_GATE, ACROSS, SUMS = (gl.constexpr(n) for n in (0, 1, 2, 3, 4, 16))
PAIRS_LEFT = gl.constexpr(gl.DotOperandLayout(0, PAIRS, 2))


@gluon.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
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
    d_first_ptr,  # dq's memory, in k's dtype: the first rows of D^T at the end of each chunk (`reverse`), read before
    d_rest_ptr,  # dk's, likewise: the others
    d_entering_ptr,  # fp32 as entering_ptr: D at the end of each segment
    dq_ptr,  # [B, T, H_v, K], written
    dk_ptr,  # likewise
    d_beta_ptr,  # fp32 [B, T, H_v], written
    dg_ptr,  # fp32 [B, T, H_v], written if GATE
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
    SPREAD: gl.constexpr,  # how many of k's elements one of dq's is long
    KIND: gl.constexpr,
    NORMALIZE: gl.constexpr,
    GATE: gl.constexpr,
    WHOLE: gl.constexpr,  # whether runs are single segments, and what enters them is given for each run
    PACKED: gl.constexpr,
):
    dtype: gl.constexpr = k_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, WIDTH], dtype)
    bytes: gl.constexpr = TOKENS * WIDTH * 2
    # Those that are asked for a chunk ahead have two places.
    u_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)
    do_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)
    q_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)
    dv_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], layout)
    s_tiles = gl.allocate_shared_memory(dtype, [1, WIDTH, WIDTH], layout)  # S^T
    d_tiles = gl.allocate_shared_memory(dtype, [1, WIDTH, WIDTH], layout)  # D^T
    z_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, TOKENS], layout)
    m_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, TOKENS], layout)  # m, then sums
    prefixes = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    betas = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    q_lengths = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    k_lengths = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, PAIRS))
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, PAIRS))
    no_pairs = gl.zeros([TOKENS, TOKENS], gl.float32, PAIRS)
    nothing = gl.zeros([TOKENS, WIDTH], gl.float32, WIDE)

    head, batch, start, last, chunk, border, _ = segment_of(
        gl.program_id(0), places_ptr, T, H_v, segments, segment_chunks, PACKED
    )  # fmt: skip
    key_head = head // (H_v // H)
    key_row = batch * T * H + key_head
    row = batch * T * H_v + head
    at = (batch * H_v + head) * chunks + chunk
    key_at = (batch * H + key_head) * chunks + chunk

    source = border if WHOLE else (batch * H_v + head) * segments + gl.program_id(1)
    state = gl.zeros([WIDTH, WIDTH], gl.float32, STATE)
    if entering_ptr is not None:
        r = gl.arange(0, WIDTH, gl.SliceLayout(1, STATE))
        d = gl.arange(0, WIDTH, gl.SliceLayout(0, STATE))
        state = gl.load(entering_ptr + source * WIDTH * WIDTH + (r[:, None] + d[None, :] * WIDTH))
    # Each is of tiles that are waited for together.
    tokens_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dv_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    d_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(tokens_here, 1)
    mbarrier.init(dv_here, 1)
    mbarrier.init(d_here, 1)
    fence_async_shared()
    meet()
    do_view = tokens_view(do_ptr + row * WIDTH, H_v * WIDTH, last, WIDTH, layout)
    dv_view = tokens_view(dv_ptr + row * WIDTH, H_v * WIDTH, last, WIDTH, layout)
    u_view = tokens_view(u_ptr + row * WIDTH, H_v * WIDTH, last, WIDTH, layout)
    q_view = tokens_view(q_ptr + key_row * WIDTH, H * WIDTH, last, WIDTH, layout)
    k_view = tokens_view(k_ptr + key_row * WIDTH, H * WIDTH, last, WIDTH, layout)
    count = (last - start + TOKENS - 1) // TOKENS
    d_first = chunk_gradient_view(d_first_ptr, row, H_v, last, SPREAD, layout)
    d_rest = chunk_gradient_view(d_rest_ptr, row, H_v, last, SPREAD, layout)
    quarters = d_tiles._reinterpret(dtype, [4, TOKENS, TOKENS], layout)
    mbarrier.expect(tokens_here, 4 * bytes, start < last)
    tma.async_copy_global_to_shared(do_view, [start, 0], tokens_here, do_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(u_view, [start, 0], tokens_here, u_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(q_view, [start, 0], tokens_here, q_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(k_view, [start, 0], tokens_here, k_tiles.index(0), start < last)
    mbarrier.expect(dv_here, bytes, start < last)
    tma.async_copy_global_to_shared(dv_view, [start, 0], dv_here, dv_tiles.index(0), start < last)
    _ask_gradient(d_first, d_rest, start, d_here, quarters, count > 1, SPREAD)
    ask_vector(betas.index(0), beta_ptr + at * TOKENS, start < last)
    if KIND == TOKEN:
        ask_vector(prefixes.index(0), prefix_ptr + at * TOKENS, start < last)
    if NORMALIZE:
        ask_vector(q_lengths.index(0), q_norms_ptr + key_at * TOKENS, start < last)
        ask_vector(k_lengths.index(0), k_norms_ptr + key_at * TOKENS, start < last)
    async_copy.commit_group()
    sums = m_tiles._reinterpret(gl.float32, [SUMS, 2, TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    for c in range(count):
        s_tiles.index(0).store(state.to(dtype))
        fence_async_shared()
        async_copy.wait_group(0)
        mbarrier.wait(tokens_here, c & 1)
        meet()
        following = start + TOKENS
        mbarrier.expect(tokens_here, 4 * bytes, following < last)
        ahead = (c + 1) & 1
        tma.async_copy_global_to_shared(do_view, [following, 0], tokens_here, do_tiles.index(ahead), following < last)
        tma.async_copy_global_to_shared(u_view, [following, 0], tokens_here, u_tiles.index(ahead), following < last)
        tma.async_copy_global_to_shared(q_view, [following, 0], tokens_here, q_tiles.index(ahead), following < last)
        tma.async_copy_global_to_shared(k_view, [following, 0], tokens_here, k_tiles.index(ahead), following < last)
        ask_vector(betas.index(ahead), beta_ptr + (at + 1) * TOKENS, following < last)
        if KIND == TOKEN:
            ask_vector(prefixes.index(ahead), prefix_ptr + (at + 1) * TOKENS, following < last)
        if NORMALIZE:
            ask_vector(q_lengths.index(ahead), q_norms_ptr + (key_at + 1) * TOKENS, following < last)
            ask_vector(k_lengths.index(ahead), k_norms_ptr + (key_at + 1) * TOKENS, following < last)
        async_copy.commit_group()
        prefix, beta = prefixes.index(c & 1), betas.index(c & 1)
        q_norms, k_norms = q_lengths.index(c & 1), k_lengths.index(c & 1)
        here, only = afresh(c & 1), afresh(0)
        u_tile, do_tile, q_tile, k_tile = (
            u_tiles.index(here),
            do_tiles.index(here),
            q_tiles.index(here),
            k_tiles.index(here),
        )
        s_tile = s_tiles.index(only)
        z = warpgroup_mma(do_tile, u_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True)
        dq = warpgroup_mma(do_tile, s_tile, nothing, use_acc=False, is_async=True)
        if GATE:
            scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True)
        if c > 0:
            store_sums(sums, d_beta_ptr + row, dg_ptr + row, H_v, start - TOKENS, last, True, GATE)
        q_read, k_read, to_end, total = gradient_factors(prefix, q_norms, k_norms, scale, KIND, NORMALIZE)
        if GATE:
            z, dq, scores = warpgroup_mma_wait(0, [z, dq, scores])
        else:
            z, dq = warpgroup_mma_wait(0, [z, dq])
        z *= between_pairs(prefix, q_norms, k_norms, KIND, NORMALIZE)
        z = gl.where(i[:, None] >= j[None, :], z * scale, 0.0)
        if GATE:
            # w, [i, j]: what i reads from an earlier j.
            crossing = gl.where(i[:, None] > j[None, :], z * scores, 0.0)
        z_tiles.index(0).store(z.to(dtype))
        dq *= q_read[:, None]
        if GATE:
            reads = sums_of(q_tile.load(WIDE).to(gl.float32) * dq)
        fence_async_shared()
        mbarrier.wait(dv_here, c & 1)
        meet()
        here, only = afresh(c & 1), afresh(0)
        u_tile, q_tile, k_tile = u_tiles.index(here), q_tiles.index(here), k_tiles.index(here)
        dv_tile, z_tile = dv_tiles.index(only), z_tiles.index(only)
        dq = warpgroup_mma(z_tile, k_tile, dq, is_async=True)
        dk = warpgroup_mma(z_tile.permute((1, 0)), q_tile, nothing, use_acc=False, is_async=True)
        m = warpgroup_mma(dv_tile, u_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True)
        if GATE:
            scores = warpgroup_mma(k_tile, k_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True)
            dq, dk, m, scores = warpgroup_mma_wait(0, [dq, dk, m, scores])
        else:
            dq, dk, m = warpgroup_mma_wait(0, [dq, dk, m])
        if c < count - 1:
            mbarrier.wait(d_here, c & 1)
        else:
            _entering_gradient(quarters, d_entering_ptr + source * WIDTH * WIDTH)
        write(dq_ptr + row * WIDTH, dq, H_v * WIDTH, start, last)
        # u is beta times what was missing, dv beta times its gradient.
        strength = beta.load(gl.SliceLayout(1, PAIRS))
        d_beta = sums_of(gl.where(i[:, None] == j[None, :], m / (strength * strength)[:, None], 0.0))
        m *= between_pairs(prefix, k_norms, k_norms, KIND, NORMALIZE)
        m = gl.where(i[:, None] > j[None, :], -m, 0.0)
        m_tiles.index(0).store(m.to(dtype))
        if GATE:
            crossing += m * scores
            # In the place of `do`, which is done with.
            w_tiles = do_tiles.index(c & 1)._reinterpret(dtype, [2, TOKENS, TOKENS], layout)
            w_tiles.index(0).store(crossing.to(dtype))
        fence_async_shared()
        meet()
        here, only = afresh(c & 1), afresh(0)
        u_tile, k_tile, dv_tile, s_tile = (
            u_tiles.index(here),
            k_tiles.index(here),
            dv_tiles.index(only),
            s_tiles.index(only),
        )
        m_tile, d_tile = m_tiles.index(only), d_tiles.index(only)
        read = warpgroup_mma(dv_tile, s_tile, nothing, use_acc=False, is_async=True)
        dk = warpgroup_mma(m_tile, k_tile, dk, is_async=True)
        dk = warpgroup_mma(m_tile.permute((1, 0)), k_tile, dk, is_async=True)
        written = warpgroup_mma(u_tile, d_tile, nothing, use_acc=False, is_async=True)
        if GATE:
            t = gl.arange(0, TOKENS, gl.SliceLayout(1, PAIRS_LEFT))[:, None]
            before = gl.arange(0, TOKENS, gl.SliceLayout(0, PAIRS_LEFT))[None, :]
            w_tile = do_tiles.index(here)._reinterpret(dtype, [2, TOKENS, TOKENS], layout).index(0)
            crossed = warpgroup_mma(
                (before < t).to(dtype), w_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True
            )
            across = gl.sum(state * d_tile.load(STATE).to(gl.float32), 1) * gl.exp2(total)
            read, dk, written, crossed = warpgroup_mma_wait(0, [read, dk, written, crossed])
        else:
            read, dk, written = warpgroup_mma_wait(0, [read, dk, written])
        meet()
        mbarrier.expect(dv_here, bytes, following < last)
        tma.async_copy_global_to_shared(dv_view, [following, 0], dv_here, dv_tiles.index(0), following < last)
        _ask_gradient(d_first, d_rest, following, d_here, quarters, c + 2 < count, SPREAD)
        # Rounded before it decays, as forward had it.
        u_to_end = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(0, STATE_LEFT))
        if KIND == TOKEN:
            u_to_end = gl.exp2(total - prefix.load(gl.SliceLayout(0, STATE_LEFT)))
        if NORMALIZE:
            u_to_end *= k_norms.load(gl.SliceLayout(0, STATE_LEFT))
        weighted = (u_tile.permute((1, 0)).load(STATE_LEFT).to(gl.float32) * u_to_end[None, :]).to(dtype)
        state *= gl.exp2(total)
        state = warpgroup_mma(weighted, k_tile, state, is_async=True)
        if GATE:
            keys = k_tile.load(WIDE).to(gl.float32)
            keep(sums, READS, reads - scaled(sums_of(keys * read), k_read))
            keep(sums, STORED, scaled(sums_of(keys * written), to_end))
            sums.index(ACROSS).store(across.reshape([2, TOKENS]))
        keep(sums, D_BETA, d_beta)
        write(dk_ptr + row * WIDTH, dk - read * k_read[:, None] + written * to_end[:, None], H_v * WIDTH, start, last)
        if GATE:
            meet()
            column: gl.constexpr = gl.SliceLayout(0, PAIRS)
            reads = whole_of(sums, READS, column)
            stored = whole_of(sums, STORED, column)
            dg = gl.where(j[None, :] >= i[:, None], crossed + reads[None, :], stored[None, :])
            keep(sums, D_GATE, sums_of(dg))
        state = warpgroup_mma_wait(0, [state])
        start = following
        at += 1
        key_at += 1
    if count > 0:
        meet()
        store_sums(sums, d_beta_ptr + row, dg_ptr + row, H_v, start - TOKENS, last, True, GATE)
    mbarrier.invalidate(tokens_here)
    mbarrier.invalidate(dv_here)
    mbarrier.invalidate(d_here)


@gluon.jit
def _ask_gradient(d_first, d_rest, start, here, quarters, wanted, SPREAD: gl.constexpr):
    """Ask for a chunk's D^T [WIDTH, WIDTH], which lies in shared memory by halves of its columns."""
    mbarrier.expect(here, WIDTH * WIDTH * 2, wanted)
    for n in gl.static_range(2):
        place = [start, n * TOKENS * SPREAD]
        tma.async_copy_global_to_shared(d_first, place, here, quarters.index(2 * n), wanted)
        tma.async_copy_global_to_shared(d_rest, place, here, quarters.index(2 * n + 1), wanted)


@gluon.jit
def _entering_gradient(quarters, ptr):
    """Store in shared memory D^T of a segment's last chunk, whose tokens may be too few to hold it: what enters, as
    `reverse` rounds it."""
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [8, 1], [1, 0])
    v = gl.arange(0, TOKENS, gl.SliceLayout(1, rows))
    d = gl.arange(0, TOKENS, gl.SliceLayout(0, rows))
    for n in range(4):
        place = afresh(n)
        offsets = (place % 2 * TOKENS + v)[:, None] + ((place // 2 * TOKENS + d) * WIDTH)[None, :]
        quarters.index(n).store(gl.load(ptr + offsets).to(quarters.dtype))


@gluon.jit
def sums_of(tile):
    """[TOKENS, 2]: sums of the rows of a tile, of either half of its columns; what lies in one warp."""
    return gl.sum(tile.reshape([TOKENS, 2, tile.shape[1] // 2]), 2)


@gluon.jit
def scaled(found, factors):
    """Returns what `_sums` found, each row times its factor."""
    return found * gl.convert_layout(factors, gl.SliceLayout(1, found.type.layout))[:, None]


@gluon.jit
def keep(sums, which: gl.constexpr, found):
    sums.index(which).permute((1, 0)).store(found)


@gluon.jit
def whole_of(sums, which: gl.constexpr, layout: gl.constexpr):
    """[TOKENS]: what `_keep` kept, of both halves."""
    halves = sums._reinterpret(gl.float32, [2 * SUMS, TOKENS], VECTOR)
    return halves.index(2 * which).load(layout) + halves.index(2 * which + 1).load(layout)


@gluon.jit
def store_sums(sums, d_beta_ptr, dg_ptr, H_v, start, last, betas, GATE: gl.constexpr):
    """Store the gradients of beta, if `betas`, and of the gate from the sums of a chunk."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    t = start + gl.arange(0, TOKENS, layout)
    gl.store(d_beta_ptr + t.to(gl.int64) * H_v, whole_of(sums, D_BETA, layout), mask=(t < last) & betas)
    if GATE:
        across = sums.index(ACROSS).load(gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0]))
        across = gl.sum(gl.sum(across, 1), 0)
        gl.store(dg_ptr + t.to(gl.int64) * H_v, whole_of(sums, D_GATE, layout) + across, mask=t < last)
