# mypy: ignore-errors
"""Sweep over segments for outputs, what every token writes, and the state that leaves the run: `output` for Hopper.

In flight together are, of a chunk, products with S and between tokens; then A's; then those with u.
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
from lasp.kernels.triton.delta.hopper.common import (
    PAIRS,
    TOKENS,
    VECTOR,
    WIDE,
    WIDTH,
    afresh,
    ask_vector,
    between_pairs,
    last_of,
    meet,
    segment_of,
    tokens_view,
)


@gluon.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_hopper_output_kernel(
    q_ptr,  # [B, T, H, K]; with scale and decays if CHANNEL
    reading_ptr,  # [B, T, H, K]: what reads the state, k unless CHANNEL
    storing_ptr,  # likewise: what it is written at, k unless CHANNEL
    v_ptr,  # [B, T, H_v, V]
    inverse_ptr,  # [B, H_v, chunks, C, C]: A - I
    scores_ptr,  # likewise: P, if CHANNEL
    beta_ptr,  # fp32 [B, H_v, chunks C]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    g_ptr,  # not read
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    suffix_ptr,  # not read
    totals_ptr,  # fp32 [B, H_v, chunks, K] if CHANNEL
    o_ptr,  # [B, T, H_v, V], written
    u_ptr,  # [B, T, H_v, V], written
    state_out_ptr,  # fp32 [B or documents, H_v, K, V], written
    places_ptr,  # int32 [segments, 7] if PACKED
    entering_ptr,  # fp32 [B, H_v, segments, K, V], or None for zero
    scale,
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
    WHOLE: gl.constexpr,  # whether runs are single segments, and what enters them is given for each run
    PACKED: gl.constexpr,
):
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, WIDTH], dtype)
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, K, 16])
    STATE_LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    bytes: gl.constexpr = TOKENS * K * 2
    square: gl.constexpr = TOKENS * TOKENS * 2
    # What is asked for a chunk ahead has two places. Of wide heads q and A have one, and are asked for once that is
    # free.
    AHEAD: gl.constexpr = K == WIDTH
    q_tiles = gl.allocate_shared_memory(dtype, [2 if AHEAD else 1, TOKENS, K], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, K], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)  # then of u
    a_tiles = gl.allocate_shared_memory(dtype, [2 if AHEAD else 1, TOKENS, TOKENS], layout)
    if KIND == CHANNEL:
        r_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, K], layout)
        p_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, TOKENS], layout)
        expected: gl.constexpr = 3 * bytes + TOKENS * WIDTH * 2 + 2 * square
    else:
        p_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, TOKENS], layout)
        expected: gl.constexpr = 2 * bytes + TOKENS * WIDTH * 2 + square
    s_tiles = gl.allocate_shared_memory(dtype, [1, WIDTH, K], layout)  # S^T
    w_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], layout)  # beta W, then o
    prefixes = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    betas = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    q_lengths = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    k_lengths = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    decays = gl.allocate_shared_memory(gl.float32, [2, K], VECTOR)
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, PAIRS))
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, PAIRS))
    r = gl.arange(0, WIDTH, gl.SliceLayout(1, STATE))
    d = gl.arange(0, K, gl.SliceLayout(0, STATE))
    no_pairs = gl.zeros([TOKENS, TOKENS], gl.float32, PAIRS)
    nothing = gl.zeros([TOKENS, WIDTH], gl.float32, WIDE)

    head, batch, start, last, chunk, border, ends = segment_of(
        gl.program_id(0) // (V // WIDTH), places_ptr, T, H_v, segments, segment_chunks, PACKED
    )  # fmt: skip
    key_head = head // (H_v // H)
    key_row = batch * T * H + key_head
    row = batch * T * H_v + head
    at = (batch * H_v + head) * chunks + chunk
    key_at = (batch * H + key_head) * chunks + chunk
    count = (last - start + TOKENS - 1) // TOKENS

    column = gl.program_id(0) % (V // WIDTH) * WIDTH

    state = gl.zeros([WIDTH, K], gl.float32, STATE)
    if entering_ptr is not None:
        source = border if WHOLE else (batch * H_v + head) * segments + gl.program_id(1)
        state = gl.load(entering_ptr + source * K * V + (column + r[:, None] + d[None, :] * V))
    here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(here, 1)
    fence_async_shared()
    meet()
    q_view = tokens_view(q_ptr + key_row * K, H * K, last, K, layout)
    k_view = tokens_view(storing_ptr + key_row * K, H * K, last, K, layout)
    v_view = tokens_view(v_ptr + row * V + column, H_v * V, last, WIDTH, layout)
    o_view = tokens_view(o_ptr + row * V + column, H_v * V, last, WIDTH, layout)
    u_view = tokens_view(u_ptr + row * V + column, H_v * V, last, WIDTH, layout)
    a_view = tma.make_tensor_descriptor(
        inverse_ptr + at * (TOKENS * TOKENS), [count * TOKENS, TOKENS], [TOKENS, 1], [TOKENS, TOKENS], layout
    )
    mbarrier.expect(here, expected, start < last)
    tma.async_copy_global_to_shared(q_view, [start, 0], here, q_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(k_view, [start, 0], here, k_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(v_view, [start, 0], here, v_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(a_view, [0, 0], here, a_tiles.index(0), start < last)
    if KIND == CHANNEL:
        r_view = tokens_view(reading_ptr + key_row * K, H * K, last, K, layout)
        p_view = tma.make_tensor_descriptor(
            scores_ptr + at * (TOKENS * TOKENS), [count * TOKENS, TOKENS], [TOKENS, 1], [TOKENS, TOKENS], layout
        )
        tma.async_copy_global_to_shared(r_view, [start, 0], here, r_tiles.index(0), start < last)
        tma.async_copy_global_to_shared(p_view, [0, 0], here, p_tiles.index(0), start < last)
    ask_vector(betas.index(0), beta_ptr + at * TOKENS, start < last)
    if KIND == CHANNEL:
        ask_vector(decays.index(0), totals_ptr + at * K, start < last)
    if KIND == TOKEN:
        ask_vector(prefixes.index(0), prefix_ptr + at * TOKENS, start < last)
    if NORMALIZE:
        ask_vector(q_lengths.index(0), q_norms_ptr + key_at * TOKENS, start < last)
        ask_vector(k_lengths.index(0), k_norms_ptr + key_at * TOKENS, start < last)
    async_copy.commit_group()
    for c in range(count):
        s_tiles.index(0).store(state.to(dtype))
        fence_async_shared()
        tma.store_wait(0)
        async_copy.wait_group(0)
        mbarrier.wait(here, c & 1)
        meet()
        following = start + TOKENS
        ahead = (c + 1) & 1
        mbarrier.expect(here, expected, following < last)
        tma.async_copy_global_to_shared(k_view, [following, 0], here, k_tiles.index(ahead), following < last)
        tma.async_copy_global_to_shared(v_view, [following, 0], here, v_tiles.index(ahead), following < last)
        if AHEAD:
            tma.async_copy_global_to_shared(q_view, [following, 0], here, q_tiles.index(ahead), following < last)
            tma.async_copy_global_to_shared(a_view, [(c + 1) * TOKENS, 0], here, a_tiles.index(ahead), following < last)
        ask_vector(betas.index(ahead), beta_ptr + (at + 1) * TOKENS, following < last)
        if KIND == CHANNEL:
            ask_vector(decays.index(ahead), totals_ptr + (at + 1) * K, following < last)
        if KIND == TOKEN:
            ask_vector(prefixes.index(ahead), prefix_ptr + (at + 1) * TOKENS, following < last)
        if NORMALIZE:
            ask_vector(q_lengths.index(ahead), q_norms_ptr + (key_at + 1) * TOKENS, following < last)
            ask_vector(k_lengths.index(ahead), k_norms_ptr + (key_at + 1) * TOKENS, following < last)
        async_copy.commit_group()
        prefix, beta = prefixes.index(c & 1), betas.index(c & 1).load(gl.SliceLayout(1, WIDE))
        q_norms, k_norms = q_lengths.index(c & 1), k_lengths.index(c & 1)
        place, only = afresh(c & 1), afresh(0)
        k_tile, s_tile = k_tiles.index(place), s_tiles.index(only)
        from_start = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(1, WIDE))
        q_read = from_start
        decay = 1.0
        if KIND == CHANNEL:
            tma.async_copy_global_to_shared(r_view, [following, 0], here, r_tiles.index(ahead), following < last)
            tma.async_copy_global_to_shared(p_view, [(c + 1) * TOKENS, 0], here, p_tiles.index(ahead), following < last)
            read = warpgroup_mma(r_tiles.index(place), s_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            decay = gl.exp2(decays.index(c & 1).load(gl.SliceLayout(0, STATE)))[None, :]
            read = warpgroup_mma_wait(0, [read])
        else:
            scores = warpgroup_mma(
                q_tiles.index(place if AHEAD else only), k_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True
            )  # fmt: skip
            read = warpgroup_mma(k_tile, s_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            if KIND == TOKEN:
                total = last_of(prefix)
                decay = gl.exp2(total)
                from_start = gl.exp2(prefix.load(gl.SliceLayout(1, WIDE)))
            q_read = from_start * scale
            if NORMALIZE:
                q_read *= q_norms.load(gl.SliceLayout(1, WIDE))
                from_start *= k_norms.load(gl.SliceLayout(1, WIDE))
            pairs = between_pairs(prefix, q_norms, k_norms, KIND, NORMALIZE)
            scores, read = warpgroup_mma_wait(0, [scores, read])
            scores = gl.where(i[:, None] >= j[None, :], scores * (pairs * scale), 0.0)
            p_tiles.index(0).store(scores.to(dtype))
        w = v_tiles.index(place).load(WIDE).to(gl.float32) * beta[:, None] - read * (beta * from_start)[:, None]
        w_tiles.index(0).store(w.to(dtype))
        fence_async_shared()
        meet()
        place, only = afresh(c & 1), afresh(0)
        q_tile, a_tile = q_tiles.index(place if AHEAD else only), a_tiles.index(place if AHEAD else only)
        out = warpgroup_mma(q_tile, s_tiles.index(only).permute((1, 0)), nothing, use_acc=False, is_async=True)
        u = warpgroup_mma(a_tile, w_tiles.index(only), w, is_async=True)
        out, u = warpgroup_mma_wait(0, [out, u])
        out *= q_read[:, None]
        v_tiles.index(place).store(u.to(dtype))
        fence_async_shared()
        meet()
        if not AHEAD:
            tma.async_copy_global_to_shared(q_view, [following, 0], here, q_tiles.index(0), following < last)
            tma.async_copy_global_to_shared(a_view, [(c + 1) * TOKENS, 0], here, a_tiles.index(0), following < last)
        tma.async_copy_shared_to_global(u_view, [start, 0], v_tiles.index(c & 1))
        place, only = afresh(c & 1), afresh(0)
        u_tile = v_tiles.index(place)
        out = warpgroup_mma(p_tiles.index(place if KIND == CHANNEL else only), u_tile, out, is_async=True)
        # Rounded before it decays, as backward will have it.
        u_to_end = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(0, STATE_LEFT))
        if KIND == TOKEN:
            u_to_end = gl.exp2(total - prefix.load(gl.SliceLayout(0, STATE_LEFT)))
        if NORMALIZE and KIND != CHANNEL:
            u_to_end *= k_norms.load(gl.SliceLayout(0, STATE_LEFT))
        weighted = (u_tile.permute((1, 0)).load(STATE_LEFT).to(gl.float32) * u_to_end[None, :]).to(dtype)
        state *= decay
        state = warpgroup_mma(weighted, k_tiles.index(place), state, is_async=True)
        out, state = warpgroup_mma_wait(0, [out, state])
        w_tiles.index(0).store(out.to(dtype))
        fence_async_shared()
        meet()
        tma.async_copy_shared_to_global(o_view, [start, 0], w_tiles.index(0))
        start = following
        at += 1
        key_at += 1
    tma.store_wait(0)
    mbarrier.invalidate(here)
    if ends:
        columns = afresh(column) + r
        gl.store(state_out_ptr + border * K * V + (columns[:, None] + d[None, :] * V), state)
