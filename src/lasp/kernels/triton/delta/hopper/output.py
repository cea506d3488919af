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
    STATE,
    STATE_LEFT,
    TOKENS,
    VECTOR,
    WIDE,
    WIDTH,
    afresh,
    ask_vector,
    between_pairs,
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
    KIND: gl.constexpr,
    NORMALIZE: gl.constexpr,
    WHOLE: gl.constexpr,  # whether runs are single segments, and what enters them is given for each run
    PACKED: gl.constexpr,
):
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, WIDTH], dtype)
    bytes: gl.constexpr = TOKENS * WIDTH * 2
    square: gl.constexpr = TOKENS * TOKENS * 2
    # Those that are asked for a chunk ahead have two places.
    q_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)
    a_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, TOKENS], layout)
    if KIND == CHANNEL:
        r_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)
        p_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, TOKENS], layout)
        expected: gl.constexpr = 4 * bytes + 2 * square
    else:
        p_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, TOKENS], layout)
        expected: gl.constexpr = 3 * bytes + square
    s_tiles = gl.allocate_shared_memory(dtype, [1, WIDTH, WIDTH], layout)  # S^T
    w_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], layout)  # beta W, then o
    u_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], layout)
    prefixes = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    betas = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    q_lengths = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    k_lengths = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    decays = gl.allocate_shared_memory(gl.float32, [2, WIDTH], VECTOR)
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, PAIRS))
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, PAIRS))
    r = gl.arange(0, WIDTH, gl.SliceLayout(1, STATE))
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, STATE))
    no_pairs = gl.zeros([TOKENS, TOKENS], gl.float32, PAIRS)
    nothing = gl.zeros([TOKENS, WIDTH], gl.float32, WIDE)

    head, batch, start, last, chunk, border, ends = segment_of(
        gl.program_id(0), places_ptr, T, H_v, segments, segment_chunks, PACKED
    )  # fmt: skip
    key_head = head // (H_v // H)
    key_row = batch * T * H + key_head
    row = batch * T * H_v + head
    at = (batch * H_v + head) * chunks + chunk
    key_at = (batch * H + key_head) * chunks + chunk
    count = (last - start + TOKENS - 1) // TOKENS

    state = gl.zeros([WIDTH, WIDTH], gl.float32, STATE)
    if entering_ptr is not None:
        source = border if WHOLE else (batch * H_v + head) * segments + gl.program_id(1)
        state = gl.load(entering_ptr + source * WIDTH * WIDTH + (r[:, None] + d[None, :] * WIDTH))
    here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(here, 1)
    fence_async_shared()
    meet()
    q_view = tokens_view(q_ptr, key_row, H, last, layout)
    k_view = tokens_view(storing_ptr, key_row, H, last, layout)
    v_view = tokens_view(v_ptr, row, H_v, last, layout)
    o_view = tokens_view(o_ptr, row, H_v, last, layout)
    u_view = tokens_view(u_ptr, row, H_v, last, layout)
    a_view = tma.make_tensor_descriptor(
        inverse_ptr + at * (TOKENS * TOKENS), [count * TOKENS, TOKENS], [TOKENS, 1], [TOKENS, TOKENS], layout
    )
    mbarrier.expect(here, expected, start < last)
    tma.async_copy_global_to_shared(q_view, [start, 0], here, q_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(k_view, [start, 0], here, k_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(v_view, [start, 0], here, v_tiles.index(0), start < last)
    tma.async_copy_global_to_shared(a_view, [0, 0], here, a_tiles.index(0), start < last)
    if KIND == CHANNEL:
        r_view = tokens_view(reading_ptr, key_row, H, last, layout)
        p_view = tma.make_tensor_descriptor(
            scores_ptr + at * (TOKENS * TOKENS), [count * TOKENS, TOKENS], [TOKENS, 1], [TOKENS, TOKENS], layout
        )
        tma.async_copy_global_to_shared(r_view, [start, 0], here, r_tiles.index(0), start < last)
        tma.async_copy_global_to_shared(p_view, [0, 0], here, p_tiles.index(0), start < last)
    ask_vector(betas.index(0), beta_ptr + at * TOKENS, start < last)
    if KIND == CHANNEL:
        ask_vector(decays.index(0), totals_ptr + at * WIDTH, start < last)
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
        tma.async_copy_global_to_shared(q_view, [following, 0], here, q_tiles.index(ahead), following < last)
        tma.async_copy_global_to_shared(k_view, [following, 0], here, k_tiles.index(ahead), following < last)
        tma.async_copy_global_to_shared(v_view, [following, 0], here, v_tiles.index(ahead), following < last)
        tma.async_copy_global_to_shared(a_view, [(c + 1) * TOKENS, 0], here, a_tiles.index(ahead), following < last)
        ask_vector(betas.index(ahead), beta_ptr + (at + 1) * TOKENS, following < last)
        if KIND == CHANNEL:
            ask_vector(decays.index(ahead), totals_ptr + (at + 1) * WIDTH, following < last)
        if KIND == TOKEN:
            ask_vector(prefixes.index(ahead), prefix_ptr + (at + 1) * TOKENS, following < last)
        if NORMALIZE:
            ask_vector(q_lengths.index(ahead), q_norms_ptr + (key_at + 1) * TOKENS, following < last)
            ask_vector(k_lengths.index(ahead), k_norms_ptr + (key_at + 1) * TOKENS, following < last)
        async_copy.commit_group()
        prefix, beta = prefixes.index(c & 1), betas.index(c & 1).load(gl.SliceLayout(1, WIDE))
        q_norms, k_norms = q_lengths.index(c & 1), k_lengths.index(c & 1)
        place, only = afresh(c & 1), afresh(0)
        q_tile, k_tile, s_tile = q_tiles.index(place), k_tiles.index(place), s_tiles.index(only)
        from_start = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(1, WIDE))
        to_end = from_start
        q_read = from_start
        if KIND == CHANNEL:
            tma.async_copy_global_to_shared(r_view, [following, 0], here, r_tiles.index(ahead), following < last)
            tma.async_copy_global_to_shared(p_view, [(c + 1) * TOKENS, 0], here, p_tiles.index(ahead), following < last)
            read = warpgroup_mma(r_tiles.index(place), s_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            out = warpgroup_mma(q_tile, s_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            decay = gl.exp2(decays.index(c & 1).load(gl.SliceLayout(0, STATE)))
            read, out = warpgroup_mma_wait(0, [read, out])
        else:
            scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True)
            read = warpgroup_mma(k_tile, s_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            out = warpgroup_mma(q_tile, s_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            decay = 1.0
            if KIND == TOKEN:
                total = gl.load(prefix_ptr + at * TOKENS + TOKENS - 1)
                decay = gl.exp2(total)
                from_start = gl.exp2(prefix.load(gl.SliceLayout(1, WIDE)))
                to_end = gl.exp2(total - prefix.load(gl.SliceLayout(1, WIDE)))
            q_read = from_start * scale
            if NORMALIZE:
                lengths = k_norms.load(gl.SliceLayout(1, WIDE))
                q_read *= q_norms.load(gl.SliceLayout(1, WIDE))
                from_start *= lengths
                to_end *= lengths
            pairs = between_pairs(prefix, q_norms, k_norms, KIND, NORMALIZE)
            scores, read, out = warpgroup_mma_wait(0, [scores, read, out])
            scores = gl.where(i[:, None] >= j[None, :], scores * (pairs * scale), 0.0)
            p_tiles.index(0).store(scores.to(dtype))
        v = v_tiles.index(place).load(WIDE).to(gl.float32)
        w = v * beta[:, None] - read * (beta * from_start)[:, None]
        w_tiles.index(0).store(w.to(dtype))
        fence_async_shared()
        meet()
        place, only = afresh(c & 1), afresh(0)
        u = warpgroup_mma(a_tiles.index(place), w_tiles.index(only), w, is_async=True)
        out *= q_read[:, None]
        u = warpgroup_mma_wait(0, [u])
        u_tiles.index(0).store(u.to(dtype))
        fence_async_shared()
        meet()
        tma.async_copy_shared_to_global(u_view, [start, 0], u_tiles.index(0))
        place, only = afresh(c & 1), afresh(0)
        u_tile = u_tiles.index(only)
        p_tile = p_tiles.index(place if KIND == CHANNEL else only)
        out = warpgroup_mma(p_tile, u_tile, out, is_async=True)
        # Rounded before it decays, as backward will have it.
        u_to_end = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(0, STATE_LEFT))
        if KIND == TOKEN:
            u_to_end = gl.exp2(total - prefix.load(gl.SliceLayout(0, STATE_LEFT)))
        if NORMALIZE and KIND != CHANNEL:
            u_to_end *= k_norms.load(gl.SliceLayout(0, STATE_LEFT))
        weighted = (u_tile.permute((1, 0)).load(STATE_LEFT).to(gl.float32) * u_to_end[None, :]).to(dtype)
        if KIND == CHANNEL:
            state *= decay[None, :]
        else:
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
        gl.store(state_out_ptr + border * WIDTH * WIDTH + (r[:, None] + d[None, :] * WIDTH), state)
