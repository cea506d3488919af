# mypy: ignore-errors
"""Summarize each segment, what it adds and its transition: `summary` for Hopper.

A program has 128 of the columns of S or of M.
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

from lasp.kernels.triton.common.decays import CHANNEL, TOKEN
from lasp.kernels.triton.common.program import PLACE
from lasp.kernels.triton.delta.hopper.common import (
    TOKENS,
    VECTOR,
    WIDE,
    WIDTH,
    afresh,
    ask_vector,
    chunks_reached,
    last_of,
    meet,
    segment_of,
    tokens_view,
)


@gluon.jit(do_not_specialize=["T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_hopper_summary_kernel(
    reading_ptr,  # [B, T, H, K]: what reads the state, k unless CHANNEL
    storing_ptr,  # likewise: what it is written at, k unless CHANNEL
    v_ptr,  # [B, T, H_v, V]
    inverse_ptr,  # [B, H_v, chunks, C, C]: A - I
    beta_ptr,  # fp32 [B, H_v, chunks C]
    norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    suffix_ptr,  # not read
    totals_ptr,  # fp32 [B, H_v, chunks, K] if CHANNEL
    bounds_ptr,  # fp32 [B, H_v, chunks] if TOKEN: log2 of what passes a chunk at most
    added_ptr,  # fp32 [B, H_v, segments, K, V], written, but for a run's last segment unless TOTAL
    moves_ptr,  # fp32 [B, H_v, segments, K, K], written: M, but for a run's first segment unless TOTAL
    places_ptr,  # int32 [segments, 7] if PACKED
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
    TOTAL: gl.constexpr,  # whether a run's whole is wanted, or a state enters it
    PACKED: gl.constexpr,
):
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, WIDTH], dtype)
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, K, 16])
    STATE_LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    slices: gl.constexpr = (V + K) // WIDTH
    bytes: gl.constexpr = TOKENS * K * 2
    # Those that are asked for a chunk ahead have two places.
    k_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, K], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)  # then of u
    a_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, TOKENS], layout)
    if KIND == CHANNEL:
        r_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, K], layout)
        expected: gl.constexpr = 2 * bytes + TOKENS * WIDTH * 2 + TOKENS * TOKENS * 2
    else:
        r_tiles = k_tiles
        expected: gl.constexpr = bytes + TOKENS * WIDTH * 2 + TOKENS * TOKENS * 2
    s_tiles = gl.allocate_shared_memory(dtype, [1, WIDTH, K], layout)  # S^T
    w_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], layout)  # beta W
    prefixes = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    betas = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    lengths = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    decays = gl.allocate_shared_memory(gl.float32, [2, K], VECTOR)
    r = gl.arange(0, WIDTH, gl.SliceLayout(1, STATE))
    d = gl.arange(0, K, gl.SliceLayout(0, STATE))
    nothing = gl.zeros([TOKENS, WIDTH], gl.float32, WIDE)

    head, batch, start, last, chunk, _border, ends = segment_of(
        gl.program_id(0) // slices, places_ptr, T, H_v, segments, segment_chunks, PACKED
    )  # fmt: skip
    column = gl.program_id(0) % slices * WIDTH
    key_head = head // (H_v // H)
    key_row = batch * T * H + key_head
    row = batch * T * H_v + head
    at = (batch * H_v + head) * chunks + chunk
    key_at = (batch * H + key_head) * chunks + chunk
    count = (last - start + TOKENS - 1) // TOKENS
    begin = 0
    if PACKED:
        begin = gl.load(places_ptr + gl.program_id(1) * PLACE + 5)
    wanted = gl.where(column < V, ends == 0, start != begin)
    if TOTAL:
        wanted = count > 0
    begun = 0
    if KIND == TOKEN:
        # What is older than that leaves nothing at the segment's end, and so nothing passes through all of it.
        begun = count - chunks_reached(bounds_ptr, at, count, False)
        begun = gl.where((begun > 0) & (column >= V), count, begun)
    state = gl.where((r[:, None] + (column - V) == d[None, :]) & (begun == 0), 1.0, 0.0)
    begun = gl.where(wanted, begun, count)
    here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(here, 1)
    fence_async_shared()
    meet()
    k_view = tokens_view(storing_ptr + key_row * K, H * K, last, K, layout)
    # Columns past the end are zeros, and cost nothing.
    v_view = tma.make_tensor_descriptor(v_ptr + row * V, [last, V], [H_v * V, 1], [TOKENS, WIDTH], layout)
    a_view = tma.make_tensor_descriptor(
        inverse_ptr + at * (TOKENS * TOKENS), [count * TOKENS, TOKENS], [TOKENS, 1], [TOKENS, TOKENS], layout
    )
    c = begun
    mbarrier.expect(here, expected, c < count)
    tma.async_copy_global_to_shared(k_view, [start + c * TOKENS, 0], here, k_tiles.index(0), c < count)
    tma.async_copy_global_to_shared(v_view, [start + c * TOKENS, column], here, v_tiles.index(0), c < count)
    tma.async_copy_global_to_shared(a_view, [c * TOKENS, 0], here, a_tiles.index(0), c < count)
    if KIND == CHANNEL:
        r_view = tokens_view(reading_ptr + key_row * K, H * K, last, K, layout)
        tma.async_copy_global_to_shared(r_view, [start + c * TOKENS, 0], here, r_tiles.index(0), c < count)
        ask_vector(decays.index(0), totals_ptr + (at + c) * K, c < count)
    ask_vector(betas.index(0), beta_ptr + (at + c) * TOKENS, c < count)
    if KIND == TOKEN:
        ask_vector(prefixes.index(0), prefix_ptr + (at + c) * TOKENS, c < count)
    if NORMALIZE:
        ask_vector(lengths.index(0), norms_ptr + (key_at + c) * TOKENS, c < count)
    async_copy.commit_group()
    for step in range(count - begun):
        c = begun + step
        s_tiles.index(0).store(state.to(dtype))
        fence_async_shared()
        async_copy.wait_group(0)
        mbarrier.wait(here, step & 1)
        meet()
        following = start + (c + 1) * TOKENS
        ahead = (step + 1) & 1
        more = c + 1 < count
        mbarrier.expect(here, expected, more)
        tma.async_copy_global_to_shared(k_view, [following, 0], here, k_tiles.index(ahead), more)
        tma.async_copy_global_to_shared(v_view, [following, column], here, v_tiles.index(ahead), more)
        tma.async_copy_global_to_shared(a_view, [(c + 1) * TOKENS, 0], here, a_tiles.index(ahead), more)
        if KIND == CHANNEL:
            tma.async_copy_global_to_shared(r_view, [following, 0], here, r_tiles.index(ahead), more)
            ask_vector(decays.index(ahead), totals_ptr + (at + c + 1) * K, more)
        ask_vector(betas.index(ahead), beta_ptr + (at + c + 1) * TOKENS, more)
        if KIND == TOKEN:
            ask_vector(prefixes.index(ahead), prefix_ptr + (at + c + 1) * TOKENS, more)
        if NORMALIZE:
            ask_vector(lengths.index(ahead), norms_ptr + (key_at + c + 1) * TOKENS, more)
        async_copy.commit_group()
        prefix, beta = prefixes.index(step & 1), betas.index(step & 1).load(gl.SliceLayout(1, WIDE))
        norms = lengths.index(step & 1)
        place, only = afresh(step & 1), afresh(0)
        read = warpgroup_mma(
            r_tiles.index(place), s_tiles.index(only).permute((1, 0)), nothing, use_acc=False, is_async=True
        )  # fmt: skip
        from_start = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(1, WIDE))
        u_to_end = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(0, STATE_LEFT))
        decay = 1.0
        if KIND == TOKEN:
            total = last_of(prefix)
            decay = gl.exp2(total)
            from_start = gl.exp2(prefix.load(gl.SliceLayout(1, WIDE)))
            u_to_end = gl.exp2(total - prefix.load(gl.SliceLayout(0, STATE_LEFT)))
        if KIND == CHANNEL:
            decay = gl.exp2(decays.index(step & 1).load(gl.SliceLayout(0, STATE)))[None, :]
        if NORMALIZE:
            from_start *= norms.load(gl.SliceLayout(1, WIDE))
            u_to_end *= norms.load(gl.SliceLayout(0, STATE_LEFT))
        w = v_tiles.index(place).load(WIDE).to(gl.float32) * beta[:, None]
        read = warpgroup_mma_wait(0, [read])
        w -= read * (beta * from_start)[:, None]
        w_tiles.index(0).store(w.to(dtype))
        fence_async_shared()
        meet()
        place, only = afresh(step & 1), afresh(0)
        u = warpgroup_mma(a_tiles.index(place), w_tiles.index(only), w, is_async=True)
        state *= decay
        u = warpgroup_mma_wait(0, [u])
        # Rounded before it decays, as backward will have it.
        v_tiles.index(place).store(u.to(dtype))
        fence_async_shared()
        meet()
        place = afresh(step & 1)
        u_t = v_tiles.index(place).permute((1, 0)).load(STATE_LEFT).to(gl.float32)
        state = warpgroup_mma((u_t * u_to_end[None, :]).to(dtype), k_tiles.index(place), state, is_async=True)
        state = warpgroup_mma_wait(0, [state])
    mbarrier.invalidate(here)
    if wanted:
        segment = (batch * H_v + head) * segments + gl.program_id(1)
        columns = afresh(column) + r
        if column < V:
            gl.store(added_ptr + segment * K * V + (columns[:, None] + d[None, :] * V), state)
        else:
            gl.store(moves_ptr + segment * K * K + (columns[:, None] - V + d[None, :] * K), state)
