# mypy: ignore-errors
"""Summarize each segment where gates are not per token: `summary` for Hopper.

A program has 64 of the columns of S and M, two programs a processor.
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

from lasp.kernels.triton.common.decays import CHANNEL
from lasp.kernels.triton.common.program import PLACE
from lasp.kernels.triton.delta.hopper.common import (
    TOKENS,
    VECTOR,
    WIDTH,
    afresh,
    ask_vector,
    meet,
    segment_of,
    tokens_view,
)

COLUMNS, SLICES = gl.constexpr(64), gl.constexpr(4)  # of V and K together
NARROW = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
STATE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
STATE_LEFT = gl.constexpr(gl.DotOperandLayout(0, STATE, 2))


@gluon.jit(do_not_specialize=["T", "H", "H_v", "segments", "segment_chunks", "chunks"])
def delta_hopper_summary_kernel(
    reading_ptr,  # [B, T, H, K]: what reads the state, k unless CHANNEL
    storing_ptr,  # likewise: what it is written at, k unless CHANNEL
    v_ptr,  # [B, T, H_v, V]
    inverse_ptr,  # [B, H_v, chunks, C, C]: A - I
    beta_ptr,  # fp32 [B, H_v, chunks C]
    norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    prefix_ptr,  # not read
    suffix_ptr,  # not read
    totals_ptr,  # fp32 [B, H_v, chunks, K] if CHANNEL
    bounds_ptr,  # not read
    added_ptr,  # fp32 [B, H_v, segments, K, V], written, but for a run's last segment unless TOTAL
    moves_ptr,  # fp32 [B, H_v, segments, K, K], written: M, but for a run's first segment unless TOTAL
    places_ptr,  # int32 [segments, 7] if PACKED
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    chunks,
    KIND: gl.constexpr,
    NORMALIZE: gl.constexpr,
    TOTAL: gl.constexpr,  # whether a run's whole is wanted, or a state enters it
    PACKED: gl.constexpr,
):
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, WIDTH], dtype)
    head, batch, start, last, chunk, _, ends = segment_of(
        gl.program_id(0) // SLICES, places_ptr, T, H_v, segments, segment_chunks, PACKED
    )
    column = gl.program_id(0) % SLICES * COLUMNS
    moves = column >= WIDTH
    if TOTAL == 0:
        begin = 0
        if PACKED:
            begin = gl.load(places_ptr + gl.program_id(1) * PLACE + 5)
        if moves & (start == begin) | (column < WIDTH) & ends:
            return
    key_head = head // (H_v // H)
    key_row = batch * T * H + key_head
    row = batch * T * H_v + head
    at = (batch * H_v + head) * chunks + chunk
    key_at = (batch * H + key_head) * chunks + chunk
    count = (last - start + TOKENS - 1) // TOKENS
    # Two places each: of the next chunk meanwhile.
    k_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, WIDTH], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, COLUMNS], layout)
    a_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, TOKENS], layout)
    expected: gl.constexpr = (TOKENS * WIDTH + TOKENS * COLUMNS + TOKENS * TOKENS) * 2
    if KIND == CHANNEL:
        # Of reading keys the place of the next is free once S is read: two would leave no room for two programs.
        r_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], layout)
    s_tiles = gl.allocate_shared_memory(dtype, [1, COLUMNS, WIDTH], layout)
    w_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, COLUMNS], layout)  # beta W, then u
    betas = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    k_lengths = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    decays = gl.allocate_shared_memory(gl.float32, [2, WIDTH], VECTOR)
    r = gl.arange(0, COLUMNS, gl.SliceLayout(1, STATE))
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, STATE))
    nothing = gl.zeros([TOKENS, COLUMNS], gl.float32, NARROW)

    here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    read_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(here, 1)
    mbarrier.init(read_here, 1)
    fence_async_shared()
    meet()
    k_view = tokens_view(storing_ptr, key_row, H, last, layout)
    # Of transitions, whose v is zero, from past the end.
    v_view = tma.make_tensor_descriptor(
        v_ptr + row * WIDTH, [last, WIDTH], [H_v * WIDTH, 1], [TOKENS, COLUMNS], layout
    )  # fmt: skip
    a_view = tma.make_tensor_descriptor(
        inverse_ptr + at * (TOKENS * TOKENS), [count * TOKENS, TOKENS], [TOKENS, 1], [TOKENS, TOKENS], layout
    )
    mbarrier.expect(here, expected, count > 0)
    tma.async_copy_global_to_shared(k_view, [start, 0], here, k_tiles.index(0), count > 0)
    tma.async_copy_global_to_shared(v_view, [start, column], here, v_tiles.index(0), count > 0)
    tma.async_copy_global_to_shared(a_view, [0, 0], here, a_tiles.index(0), count > 0)
    if KIND == CHANNEL:
        r_view = tokens_view(reading_ptr, key_row, H, last, layout)
        mbarrier.expect(read_here, TOKENS * WIDTH * 2, count > 0)
        tma.async_copy_global_to_shared(r_view, [start, 0], read_here, r_tiles.index(0), count > 0)
    state = gl.where((r + column)[:, None] == (d + WIDTH)[None, :], 1.0, 0.0)
    ask_vector(betas.index(0), beta_ptr + at * TOKENS, count > 0)
    if KIND == CHANNEL:
        ask_vector(decays.index(0), totals_ptr + at * WIDTH, count > 0)
    if NORMALIZE:
        ask_vector(k_lengths.index(0), norms_ptr + key_at * TOKENS, count > 0)
    async_copy.commit_group()
    for c in range(count):
        s_tiles.index(0).store(state.to(dtype))
        fence_async_shared()
        async_copy.wait_group(0)
        mbarrier.wait(here, c & 1)
        if KIND == CHANNEL:
            mbarrier.wait(read_here, c & 1)
        meet()
        following = start + TOKENS
        ahead = (c + 1) & 1
        mbarrier.expect(here, expected, following < last)
        tma.async_copy_global_to_shared(k_view, [following, 0], here, k_tiles.index(ahead), following < last)
        tma.async_copy_global_to_shared(v_view, [following, column], here, v_tiles.index(ahead), following < last)
        tma.async_copy_global_to_shared(a_view, [(c + 1) * TOKENS, 0], here, a_tiles.index(ahead), following < last)
        ask_vector(betas.index(ahead), beta_ptr + (at + 1) * TOKENS, following < last)
        if KIND == CHANNEL:
            ask_vector(decays.index(ahead), totals_ptr + (at + 1) * WIDTH, following < last)
        if NORMALIZE:
            ask_vector(k_lengths.index(ahead), norms_ptr + (key_at + 1) * TOKENS, following < last)
        async_copy.commit_group()
        place, only = afresh(c & 1), afresh(0)
        reads = r_tiles.index(only) if KIND == CHANNEL else k_tiles.index(place)
        read = warpgroup_mma(reads, s_tiles.index(only).permute((1, 0)), nothing, use_acc=False, is_async=True)
        beta = betas.index(c & 1).load(gl.SliceLayout(1, NARROW))
        v = v_tiles.index(place).load(NARROW).to(gl.float32) * beta[:, None]
        norms = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(1, NARROW))
        if NORMALIZE:
            norms = k_lengths.index(c & 1).load(gl.SliceLayout(1, NARROW))
        if KIND == CHANNEL:
            state *= gl.exp2(decays.index(c & 1).load(gl.SliceLayout(0, STATE)))[None, :]
        read = warpgroup_mma_wait(0, [read])
        w = v - read * (beta * norms)[:, None]
        w_tiles.index(0).store(w.to(dtype))
        fence_async_shared()
        meet()
        if KIND == CHANNEL:
            mbarrier.expect(read_here, TOKENS * WIDTH * 2, following < last)
            tma.async_copy_global_to_shared(r_view, [following, 0], read_here, r_tiles.index(0), following < last)
        place, only = afresh(c & 1), afresh(0)
        u = warpgroup_mma(a_tiles.index(place), w_tiles.index(only), w, is_async=True)
        u = warpgroup_mma_wait(0, [u])
        meet()
        w_tiles.index(0).store(u.to(dtype))
        meet()
        place, only = afresh(c & 1), afresh(0)
        weighted = w_tiles.index(only).permute((1, 0)).load(STATE_LEFT)
        if NORMALIZE:
            factors = k_lengths.index(c & 1).load(gl.SliceLayout(0, STATE_LEFT))
            weighted = (weighted.to(gl.float32) * factors[None, :]).to(dtype)
        state = warpgroup_mma(weighted, k_tiles.index(place), state, is_async=True)
        state = warpgroup_mma_wait(0, [state])
        start = following
        at += 1
        key_at += 1
    mbarrier.invalidate(here)
    mbarrier.invalidate(read_here)
    index = (batch * H_v + head) * segments + gl.program_id(1)
    target = added_ptr + index * WIDTH * WIDTH + column
    if moves:
        target = moves_ptr + index * WIDTH * WIDTH + column - WIDTH
    gl.store(target + (r[:, None] + d[None, :] * WIDTH), state)
