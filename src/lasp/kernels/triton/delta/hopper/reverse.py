# mypy: ignore-errors
"""Sweep backward over segments with the gradient D of the state: `reverse` for Hopper.

In flight together are, of a chunk, products with D and between tokens; then what outputs' gradients give to dU and to
D; then A's; then what dv takes from D.
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
    PAIRS,
    TOKENS,
    VECTOR,
    WIDE,
    WIDTH,
    afresh,
    ask_vector,
    between_pairs,
    chunk_gradient_view,
    chunks_reached,
    last_of,
    meet,
    reading_factors,
    segment_of,
    tokens_view,
)


@gluon.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_hopper_reverse_kernel(
    q_ptr,  # [B, T, H, K]; with scale and decays if CHANNEL
    reading_ptr,  # [B, T, H, K]: what reads the state, k unless CHANNEL
    storing_ptr,  # likewise: what it is written at, k unless CHANNEL
    do_ptr,  # [B, T, H_v, V]
    inverse_ptr,  # [B, H_v, chunks, C, C]: A - I
    scores_ptr,  # likewise: P, if CHANNEL
    beta_ptr,  # fp32 [B, H_v, chunks C]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    g_ptr,  # not read
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    suffix_ptr,  # not read
    totals_ptr,  # fp32 [B, H_v, chunks, K] if CHANNEL
    bounds_ptr,  # fp32 [B, H_v, chunks] if TOKEN, unless VALUES: log2 of what passes a chunk at most
    added_ptr,  # fp32 [B, H_v, segments, K, V], written unless VALUES, but for a run's first segment unless TOTAL
    dv_ptr,  # [B, T, H_v, V], written if VALUES
    d_chunks_ptr,  # [B, H_v, chunks, V, K], written if VALUES: D^T at the end of each chunk, rounded; if JOINED dq's
    # memory, or dg's, for its first rows
    d_rest_ptr,  # if JOINED and VALUES dk's memory, or dg's, for the other rows
    d_tail_ptr,  # [B or documents, H_v, V, K], written if PLACED and VALUES: D^T at the end of each run's last chunk
    places_ptr,  # int32 [segments, 7] if PACKED
    entering_ptr,  # fp32 as added_ptr, if VALUES: D at the end of each segment; or None for zero
    scale,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    chunks,
    K: gl.constexpr,
    V: gl.constexpr,
    JOINED: gl.constexpr,
    SPREAD: gl.constexpr,  # how many elements of D one of the gradient is long in whose place it lies
    PLACED: gl.constexpr,  # whether that is dg
    KIND: gl.constexpr,
    NORMALIZE: gl.constexpr,
    TOTAL: gl.constexpr,  # whether a run's whole is wanted
    VALUES: gl.constexpr,
    WHOLE: gl.constexpr,  # whether runs are single segments, and what enters them is given for each run
    PACKED: gl.constexpr,
):
    dtype: gl.constexpr = do_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, WIDTH], dtype)
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, K, 16])
    STATE_LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    bytes: gl.constexpr = TOKENS * K * 2
    square: gl.constexpr = TOKENS * TOKENS * 2
    head, batch, start, last, chunk, border, ends = segment_of(
        gl.program_id(0) // (V // WIDTH), places_ptr, T, H_v, segments, segment_chunks, PACKED
    )  # fmt: skip
    column = gl.program_id(0) % (V // WIDTH) * WIDTH
    key_head = head // (H_v // H)
    key_row = batch * T * H + key_head
    row = batch * T * H_v + head
    count = (last - start + TOKENS - 1) // TOKENS
    at = (batch * H_v + head) * chunks + chunk
    key_at = (batch * H + key_head) * chunks + chunk
    wanted = count > 0
    if VALUES == 0 and TOTAL == 0:
        begin = 0
        if PACKED:
            begin = gl.load(places_ptr + gl.program_id(1) * PLACE + 5)
        wanted = wanted & (start != begin)
    walked = count
    if KIND == TOKEN and VALUES == 0:
        # Of what comes later nothing is left at the segment's start.
        walked = chunks_reached(bounds_ptr, at, count, True)
    walked = gl.where(wanted, walked, 0)
    # What is asked for a chunk ahead has two places. Of wide heads q and A have one, and are asked for once that is
    # free.
    AHEAD: gl.constexpr = K == WIDTH
    q_tiles = gl.allocate_shared_memory(dtype, [2 if AHEAD else 1, TOKENS, K], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, K], layout)
    do_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)  # then of dv
    a_tiles = gl.allocate_shared_memory(dtype, [2 if AHEAD else 1, TOKENS, TOKENS], layout)
    if KIND == CHANNEL:
        r_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, K], layout)
        p_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, TOKENS], layout)
        expected: gl.constexpr = 3 * bytes + TOKENS * WIDTH * 2 + 2 * square
    else:
        p_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, TOKENS], layout)
        expected: gl.constexpr = 2 * bytes + TOKENS * WIDTH * 2 + square
    d_tiles = gl.allocate_shared_memory(dtype, [1, WIDTH, K], layout)  # D^T
    du_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], layout)
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

    state = gl.zeros([WIDTH, K], gl.float32, STATE)
    if entering_ptr is not None:
        source = border if WHOLE else (batch * H_v + head) * segments + gl.program_id(1)
        state = gl.load(entering_ptr + source * K * V + (column + r[:, None] + d[None, :] * V))
    if VALUES and PLACED:
        inside = ends & (r[:, None] >= 0) & (d[None, :] >= 0)
        gl.store(d_tail_ptr + border * K * V + ((column + r[:, None]) * K + d[None, :]), state.to(dtype), mask=inside)
    here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(here, 1)
    fence_async_shared()
    meet()
    q_view = tokens_view(q_ptr + key_row * K, H * K, last, K, layout)
    k_view = tokens_view(storing_ptr + key_row * K, H * K, last, K, layout)
    do_view = tokens_view(do_ptr + row * V + column, H_v * V, last, WIDTH, layout)
    a_view = tma.make_tensor_descriptor(
        inverse_ptr + at * (TOKENS * TOKENS), [count * TOKENS, TOKENS], [TOKENS, 1], [TOKENS, TOKENS], layout
    )
    if VALUES:
        dv_view = tokens_view(dv_ptr + row * V + column, H_v * V, last, WIDTH, layout)
        if JOINED:
            d_first = chunk_gradient_view(d_chunks_ptr, row, H_v, last, SPREAD, layout)
            d_rest = chunk_gradient_view(d_rest_ptr, row, H_v, last, SPREAD, layout)
            quarters = d_tiles._reinterpret(dtype, [4, TOKENS, TOKENS], layout)
        else:
            d_view = tma.make_tensor_descriptor(
                d_chunks_ptr + at * (V * K), [count * V, K], [K, 1], [WIDTH, K], layout
            )  # fmt: skip
    c = walked - 1
    mbarrier.expect(here, expected, wanted)
    tma.async_copy_global_to_shared(q_view, [start + c * TOKENS, 0], here, q_tiles.index(0), wanted)
    tma.async_copy_global_to_shared(k_view, [start + c * TOKENS, 0], here, k_tiles.index(0), wanted)
    tma.async_copy_global_to_shared(do_view, [start + c * TOKENS, 0], here, do_tiles.index(0), wanted)
    tma.async_copy_global_to_shared(a_view, [c * TOKENS, 0], here, a_tiles.index(0), wanted)
    if KIND == CHANNEL:
        r_view = tokens_view(reading_ptr + key_row * K, H * K, last, K, layout)
        p_view = tma.make_tensor_descriptor(
            scores_ptr + at * (TOKENS * TOKENS), [count * TOKENS, TOKENS], [TOKENS, 1], [TOKENS, TOKENS], layout
        )
        tma.async_copy_global_to_shared(r_view, [start + c * TOKENS, 0], here, r_tiles.index(0), wanted)
        tma.async_copy_global_to_shared(p_view, [c * TOKENS, 0], here, p_tiles.index(0), wanted)
    ask_vector(betas.index(0), beta_ptr + (at + c) * TOKENS, wanted)
    if KIND == CHANNEL:
        ask_vector(decays.index(0), totals_ptr + (at + c) * K, wanted)
    if KIND == TOKEN:
        ask_vector(prefixes.index(0), prefix_ptr + (at + c) * TOKENS, wanted)
    if NORMALIZE:
        ask_vector(q_lengths.index(0), q_norms_ptr + (key_at + c) * TOKENS, wanted)
        ask_vector(k_lengths.index(0), k_norms_ptr + (key_at + c) * TOKENS, wanted)
    async_copy.commit_group()
    for step in range(walked):
        c = walked - 1 - step
        d_tiles.index(0).store(state.to(dtype))
        fence_async_shared()
        if VALUES:
            tma.store_wait(0)  # dv of the chunk before is on its way
        async_copy.wait_group(0)
        mbarrier.wait(here, step & 1)
        meet()
        if VALUES:
            if JOINED:
                # Of a chunk that has too few tokens to hold it the rest is left out.
                for n in gl.static_range(2):
                    place = [start + c * TOKENS, n * TOKENS * SPREAD]
                    tma.async_copy_shared_to_global(d_first, place, quarters.index(2 * n))
                    tma.async_copy_shared_to_global(d_rest, place, quarters.index(2 * n + 1))
            else:
                tma.async_copy_shared_to_global(d_view, [c * V + column, 0], d_tiles.index(0))
        following = start + (c - 1) * TOKENS
        ahead = (step + 1) & 1
        mbarrier.expect(here, expected, c > 0)
        tma.async_copy_global_to_shared(k_view, [following, 0], here, k_tiles.index(ahead), c > 0)
        tma.async_copy_global_to_shared(do_view, [following, 0], here, do_tiles.index(ahead), c > 0)
        if AHEAD:
            tma.async_copy_global_to_shared(q_view, [following, 0], here, q_tiles.index(ahead), c > 0)
            tma.async_copy_global_to_shared(a_view, [(c - 1) * TOKENS, 0], here, a_tiles.index(ahead), c > 0)
        if KIND == CHANNEL:
            tma.async_copy_global_to_shared(r_view, [following, 0], here, r_tiles.index(ahead), c > 0)
            tma.async_copy_global_to_shared(p_view, [(c - 1) * TOKENS, 0], here, p_tiles.index(ahead), c > 0)
        ask_vector(betas.index(ahead), beta_ptr + (at + c - 1) * TOKENS, c > 0)
        if KIND == CHANNEL:
            ask_vector(decays.index(ahead), totals_ptr + (at + c - 1) * K, c > 0)
        if KIND == TOKEN:
            ask_vector(prefixes.index(ahead), prefix_ptr + (at + c - 1) * TOKENS, c > 0)
        if NORMALIZE:
            ask_vector(q_lengths.index(ahead), q_norms_ptr + (key_at + c - 1) * TOKENS, c > 0)
            ask_vector(k_lengths.index(ahead), k_norms_ptr + (key_at + c - 1) * TOKENS, c > 0)
        async_copy.commit_group()
        prefix, beta = prefixes.index(step & 1), betas.index(step & 1).load(gl.SliceLayout(1, WIDE))
        q_norms, k_norms = q_lengths.index(step & 1), k_lengths.index(step & 1)
        place, only = afresh(step & 1), afresh(0)
        k_tile = k_tiles.index(place)
        if KIND != CHANNEL:
            scores = warpgroup_mma(
                q_tiles.index(place if AHEAD else only), k_tile.permute((1, 0)), no_pairs, use_acc=False, is_async=True
            )  # fmt: skip
        d_u = warpgroup_mma(k_tile, d_tiles.index(only).permute((1, 0)), nothing, use_acc=False, is_async=True)
        from_start = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(1, WIDE))
        q_read = from_start
        to_end = from_start
        if KIND == CHANNEL:
            decay = gl.exp2(decays.index(step & 1).load(gl.SliceLayout(0, STATE)))
            d_u = warpgroup_mma_wait(0, [d_u])
        else:
            decay = 1.0
            if KIND == TOKEN:
                total = last_of(prefix)
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
            scores, d_u = warpgroup_mma_wait(0, [scores, d_u])
            scores = gl.where(i[:, None] >= j[None, :], scores * (pairs * scale), 0.0)
            p_tiles.index(0).store(scores.to(dtype))
            d_u *= to_end[:, None]
        fence_async_shared()
        meet()
        place, only = afresh(step & 1), afresh(0)
        p_tile = p_tiles.index(place if KIND == CHANNEL else only)
        do_tile, q_tile = do_tiles.index(place), q_tiles.index(place if AHEAD else only)
        d_u = warpgroup_mma(p_tile.permute((1, 0)), do_tile, d_u, is_async=True)
        if KIND == CHANNEL:
            state *= decay[None, :]
            state = warpgroup_mma(do_tile.permute((1, 0)), q_tile, state, is_async=True)
        else:
            state *= decay
            factors = reading_factors(prefix, q_norms, scale, KIND, NORMALIZE, gl.SliceLayout(0, STATE_LEFT))
            decayed = (do_tile.permute((1, 0)).load(STATE_LEFT).to(gl.float32) * factors[None, :]).to(dtype)
            state = warpgroup_mma(decayed, q_tile, state, is_async=True)
        d_u = warpgroup_mma_wait(1, [d_u])
        du_tiles.index(0).store(d_u.to(dtype))
        fence_async_shared()
        meet()
        place, only = afresh(step & 1), afresh(0)
        a_tile = a_tiles.index(place if AHEAD else only)
        y = warpgroup_mma(a_tile.permute((1, 0)), du_tiles.index(only), d_u, is_async=True)
        y, state = warpgroup_mma_wait(0, [y, state])
        if KIND == CHANNEL:
            meet()  # all have read `do`
        do_tiles.index(step & 1).store((y * beta[:, None]).to(dtype))
        fence_async_shared()
        if VALUES:
            tma.store_wait(0)  # D of this chunk is
        meet()
        if not AHEAD:
            tma.async_copy_global_to_shared(q_view, [following, 0], here, q_tiles.index(0), c > 0)
            tma.async_copy_global_to_shared(a_view, [(c - 1) * TOKENS, 0], here, a_tiles.index(0), c > 0)
        place, only = afresh(step & 1), afresh(0)
        dv_tile = do_tiles.index(place)
        if VALUES:
            tma.async_copy_shared_to_global(dv_view, [start + c * TOKENS, 0], dv_tile)
        factors = reading_factors(prefix, k_norms, 1.0, KIND, NORMALIZE, gl.SliceLayout(0, STATE_LEFT))
        erased = (dv_tile.permute((1, 0)).load(STATE_LEFT).to(gl.float32) * -factors[None, :]).to(dtype)
        reads = r_tiles.index(place) if KIND == CHANNEL else k_tiles.index(place)
        state = warpgroup_mma(erased, reads, state, is_async=True)
        state = warpgroup_mma_wait(0, [state])
    tma.store_wait(0)
    mbarrier.invalidate(here)
    if VALUES == 0:
        # Of a run's first segment what is written is looked at by nobody unless TOTAL.
        added_ptr += ((batch * H_v + head) * segments + gl.program_id(1)) * K * V
        gl.store(added_ptr + (column + r[:, None] + d[None, :] * V), state)
