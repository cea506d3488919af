# mypy: ignore-errors
"""`channel_gradients` of bounded chunks for Hopper, in Triton's lower language: heads of 128 channels and 128 values, bf16.

The same sums as `channel_gradients`, whose legend holds, of 64 channels of a chunk at a time. A program goes from one to
the next as in `hopper_gradients`. Of queries and keys what lies in shared memory is soon what they are at the chunk's
middle: `near_q`, `near_r` and `far_k`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from lasp.kernels.triton.common.decays import LOG2_E, MIN_LOG2
from lasp.kernels.triton.common.program import CHUNK_PLACE
from lasp.kernels.triton.delta.hopper import (
    AS_LEFT,
    NARROW,
    PART,
    PARTS,
    TOKENS,
    WIDTH,
    afresh,
    again,
    ask_state,
    ask_tokens,
    chunk_of,
    loaded,
    meet,
    write,
)

HALF = gl.constexpr(32)
TO_MIDDLE = gl.constexpr(0)  # the place of its matrix, level -2 of `load_intervals`


@gluon.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "chunks", "programs"])
def delta_hopper_channel_gradients_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    do_ptr,  # [B, T, H_v, V]
    u_ptr,  # [B, T, H_v, V]
    dv_ptr,  # [B, T, H_v, V]
    g_ptr,  # fp32 [B, T, H_v, K]
    q_norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    k_norms_ptr,  # likewise
    beta_ptr,  # fp32 [B, H_v, chunks C]
    intervals_ptr,  # fp16 [LEVELS + 2, C, C], see `load_intervals`
    unbounded_ptr,  # int32 [B, H_v, chunks]
    totals_ptr,  # fp32 [B, H_v, chunks, K]: base-2 log-decay of each chunk
    s_chunks_ptr,  # [B, H_v, chunks, V, K]: S^T at the start of each chunk
    d_chunks_ptr,  # likewise: D^T at the end of each chunk
    dq_ptr,  # [B, T, H_v, K], written
    dk_ptr,  # likewise
    d_beta_ptr,  # fp32 [B, T, H_v], written
    dg_ptr,  # fp32 [B, T, H_v, K], written if GATE
    places_ptr,  # int32 [chunks, 3] if PACKED
    scale,
    B,
    T,
    H,
    H_v,
    chunks,
    programs,
    NORMALIZE: gl.constexpr,
    GATE: gl.constexpr,
    FROM_ZERO: gl.constexpr,  # whether no run has an initial state
    PACKED: gl.constexpr,
):
    dtype: gl.constexpr = k_ptr.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, WIDTH], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, PART], dtype)
    gates_layout: gl.constexpr = loaded(PART, 32)
    u_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], wide)
    x_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, WIDTH], wide)  # do, then dv
    s_tiles = gl.allocate_shared_memory(dtype, [1, WIDTH, PART], narrow)  # S^T, then D^T
    q_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, PART], narrow)  # q, then near_q
    k_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, PART], narrow)  # k, then far_k
    r_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, PART], narrow)  # near_r, then terms
    z_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, TOKENS], narrow)  # z, then m, then terms
    g_tile = gl.allocate_shared_memory(gl.float32, [TOKENS, PART], gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
    operands = gl.allocate_shared_memory(gl.float16, [1, TOKENS, PART], narrow)
    interval = gl.allocate_shared_memory(gl.float16, [TOKENS, TOKENS], narrow)
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, NARROW))
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, NARROW))
    state_offsets = (
        gl.arange(0, WIDTH, gl.SliceLayout(1, loaded(PART, 16)))[:, None] * WIDTH
        + gl.arange(0, PART, gl.SliceLayout(0, loaded(PART, 16)))[None, :]
    )
    nothing = gl.zeros([TOKENS, PART], gl.float32, NARROW)
    ones = gl.full([TOKENS, HALF], 1.0, gl.float16, AS_LEFT)

    end = B * H_v * chunks
    item = gl.program_id(0)
    chunk, start, last, at, key_row, row, key_at = chunk_of(
        item // PARTS, end, places_ptr, T, H, H_v, chunks, PACKED
    )  # fmt: skip
    column = item % PARTS * PART
    square_row = gl.arange(0, TOKENS, gl.SliceLayout(1, loaded(TOKENS, 16)))
    square_column = gl.arange(0, TOKENS, gl.SliceLayout(0, loaded(TOKENS, 16)))
    async_copy.async_copy_global_to_shared(
        interval, intervals_ptr + TO_MIDDLE * TOKENS * TOKENS + (square_row[:, None] * TOKENS + square_column[None, :])
    )
    ask_tokens(g_tile, g_ptr, column, row, H_v, start, last)
    async_copy.commit_group()
    ask_tokens(x_tiles.index(0), do_ptr, 0, row, H_v, start, last)
    async_copy.commit_group()
    ask_tokens(u_tiles.index(0), u_ptr, 0, row, H_v, start, last)
    ask_state(s_tiles.index(0), s_chunks_ptr, column, at, item < PARTS * end)
    async_copy.commit_group()
    ask_tokens(q_tiles.index(0), q_ptr, column, key_row, H, start, last)
    ask_tokens(k_tiles.index(0), k_ptr, column, key_row, H, start, last)
    async_copy.commit_group()
    for _ in range((PARTS * end - item + programs - 1) // programs):
        async_copy.wait_group(3)
        meet()
        gates = g_tile.load(gates_layout)
        gates = gl.where(gates <= 0, gl.maximum(gates * LOG2_E, MIN_LOG2), float("nan"))
        operands.index(0).store(gates.to(gl.float16))
        async_copy.wait_group(0)
        fence_async_shared()
        meet()
        only = afresh(0)
        operand = operands.index(only)
        x_tile = x_tiles.index(only)
        u_tile = u_tiles.index(only)
        q_tile = q_tiles.index(only)
        k_tile = k_tiles.index(only)
        to_middle = warpgroup_mma(interval, operand, nothing, use_acc=False, is_async=True)
        z = warpgroup_mma(x_tile, u_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        q = q_tile.load(NARROW)
        k = k_tile.load(NARROW)
        to_middle, z = warpgroup_mma_wait(0, [to_middle, z])
        z_tiles.index(0).store(gl.where(i[:, None] >= j[None, :], z * scale, 0.0).to(dtype))
        q_norms = scale_of(q_norms_ptr + key_at * TOKENS, i, NORMALIZE)
        k_norms = scale_of(k_norms_ptr + key_at * TOKENS, i, NORMALIZE)
        q_tiles.index(0).store((q.to(gl.float32) * q_norms[:, None] * gl.exp2(to_middle)).to(dtype))
        r_tiles.index(0).store((k.to(gl.float32) * k_norms[:, None] * gl.exp2(again(to_middle))).to(dtype))
        k_tiles.index(0).store((k.to(gl.float32) * k_norms[:, None] * gl.exp2(-again(to_middle))).to(dtype))
        item += programs
        next_chunk, next_start, next_last, next_at, next_key_row, next_row, next_key_at = chunk_of(
            item // PARTS, end, places_ptr, T, H, H_v, chunks, PACKED
        )
        next_column = item % PARTS * PART
        ask_tokens(g_tile, g_ptr, next_column, next_row, H_v, next_start, next_last)
        async_copy.commit_group()
        # What is unbounded is another launch's.
        shown = gl.where(gl.load(unbounded_ptr + at) == 0, last, start)
        fence_async_shared()
        meet()
        only = afresh(0)
        operand = operands.index(only)
        x_tile = x_tiles.index(only)
        s_tile = s_tiles.index(only)
        z_tile = z_tiles.index(only)
        q_tile = q_tiles.index(only)
        k_tile = k_tiles.index(only)
        early = warpgroup_mma(ones, operand.slice(0, HALF), nothing, use_acc=False, is_async=True)
        d_q = warpgroup_mma(x_tile, s_tile, nothing, use_acc=False, is_async=True)
        writes = warpgroup_mma(z_tile.permute((1, 0)), q_tile, nothing, use_acc=False, is_async=True)
        early, d_q, writes = warpgroup_mma_wait(0, [early, d_q, writes])
        meet()
        ask_tokens(x_tiles.index(0), dv_ptr, 0, row, H_v, start, last)
        async_copy.commit_group()
        d_q *= gl.exp2(early) * scale
        only = afresh(0)
        z_tile = z_tiles.index(only)
        k_tile = k_tiles.index(only)
        d_q = warpgroup_mma(z_tile, k_tile, d_q, is_async=True)
        d_q = warpgroup_mma_wait(0, [d_q])
        terms = q_tile.load(NARROW).to(gl.float32) * d_q
        d_q *= gl.exp2(again(to_middle))
        if NORMALIZE:
            d_q *= gl.load(q_norms_ptr + key_at * TOKENS + i)[:, None]
        write(dq_ptr, d_q, column, row, H_v, start, shown)

        async_copy.wait_group(0)
        fence_async_shared()
        meet()
        only = afresh(0)
        operand = operands.index(only)
        x_tile = x_tiles.index(only)
        u_tile = u_tiles.index(only)
        s_tile = s_tiles.index(only)
        m = warpgroup_mma(x_tile, u_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        early = warpgroup_mma(ones, operand.slice(0, HALF), nothing, use_acc=False, is_async=True)
        d_r = warpgroup_mma(x_tile, s_tile, nothing, use_acc=False, is_async=True)
        m, early, d_r = warpgroup_mma_wait(0, [m, early, d_r])
        if column == 0:
            # u is beta times what was missing, dv beta times its gradient.
            beta = gl.load(beta_ptr + at * TOKENS + i)
            d_beta = gl.sum(gl.where(i[:, None] == j[None, :], m, 0.0), 1) / beta / beta
            gl.store(d_beta_ptr + row + (start + i).to(gl.int64) * H_v, d_beta, mask=start + i < shown)
        z_tiles.index(0).store(gl.where(i[:, None] > j[None, :], -m, 0.0).to(dtype))
        fence_async_shared()
        meet()
        ask_state(s_tiles.index(0), d_chunks_ptr, column, at, True)
        async_copy.commit_group()
        if GATE:
            # Once more, since D takes its place.
            state = gl.load(s_chunks_ptr + at * (WIDTH * WIDTH) + column + state_offsets)
        ask_tokens(x_tiles.index(0), do_ptr, 0, next_row, H_v, next_start, next_last)
        async_copy.commit_group()
        d_r *= -gl.exp2(early)
        only = afresh(0)
        z_tile = z_tiles.index(only)
        k_tile = k_tiles.index(only)
        r_tile = r_tiles.index(only)
        d_r = warpgroup_mma(z_tile, k_tile, d_r, is_async=True)
        writes = warpgroup_mma(z_tile.permute((1, 0)), r_tile, writes, is_async=True)
        d_r, writes = warpgroup_mma_wait(0, [d_r, writes])
        terms += r_tile.load(NARROW).to(gl.float32) * d_r
        async_copy.wait_group(1)
        fence_async_shared()
        meet()
        only = afresh(0)
        operand = operands.index(only)
        u_tile = u_tiles.index(only)
        s_tile = s_tiles.index(only)
        k_tile = k_tiles.index(only)
        if GATE:
            passed = gl.sum(state.to(gl.float32) * s_tile.load(loaded(PART, 16)).to(gl.float32), 0)
        late = warpgroup_mma(ones, operand.slice(HALF, HALF), nothing, use_acc=False, is_async=True)
        d_k = warpgroup_mma(u_tile, s_tile, nothing, use_acc=False, is_async=True)
        late, d_k = warpgroup_mma_wait(0, [late, d_k])
        meet()
        ask_tokens(u_tiles.index(0), u_ptr, 0, next_row, H_v, next_start, next_last)
        ask_state(s_tiles.index(0), s_chunks_ptr, next_column, next_at, item < PARTS * end)
        async_copy.commit_group()
        d_k *= gl.exp2(late)
        far_k = k_tile.load(NARROW).to(gl.float32)
        if GATE:
            leaving = gl.sum(far_k * d_k, 0)
        d_k += writes
        terms -= far_k * d_k
        to_middle = again(to_middle)
        d_k = d_r * gl.exp2(to_middle) + d_k * gl.exp2(-to_middle)
        if NORMALIZE:
            d_k *= gl.load(k_norms_ptr + key_at * TOKENS + i)[:, None]
        write(dk_ptr, d_k, column, row, H_v, start, shown)
        if GATE:
            # In two parts, each as products of bf16 take it.
            high = terms.to(gl.bfloat16)
            z_tiles.index(0).store(high)
            r_tiles.index(0).store((terms - high.to(gl.float32)).to(gl.bfloat16))
            fence_async_shared()
        meet()
        ask_tokens(q_tiles.index(0), q_ptr, next_column, next_key_row, H, next_start, next_last)
        ask_tokens(k_tiles.index(0), k_ptr, next_column, next_key_row, H, next_start, next_last)
        async_copy.commit_group()
        if GATE:
            only = afresh(0)
            z_tile = z_tiles.index(only)
            r_tile = r_tiles.index(only)
            to_end = gl.convert_layout((i[:, None] <= j[None, :]).to(gl.bfloat16), AS_LEFT)
            dg = warpgroup_mma(to_end, z_tile, nothing, use_acc=False, is_async=True)
            dg = warpgroup_mma(to_end, r_tile, dg, is_async=True)
            passed = gl.convert_layout(passed, gl.SliceLayout(0, NARROW))
            total = gl.load(totals_ptr + at * WIDTH + column + j)
            leaving += passed * gl.exp2(total)
            dg = warpgroup_mma_wait(0, [dg])
            dg += leaving[None, :]
            if FROM_ZERO:
                # Nothing precedes a run's first token: exactly, not but for rounding.
                begins = chunk == 0
                if PACKED:
                    begins = gl.load(places_ptr + chunk * CHUNK_PLACE + 2) != 0
                dg = gl.where((i == 0)[:, None] & begins, 0.0, dg)
            write(dg_ptr, dg, column, row, H_v, start, shown)
        chunk, start, last, at, key_row, row, key_at, column = (
            next_chunk, next_start, next_last, next_at, next_key_row, next_row, next_key_at, next_column
        )  # fmt: skip
    async_copy.wait_group(0)


@gluon.jit
def scale_of(norms_ptr, i, NORMALIZE: gl.constexpr):
    if NORMALIZE:
        return gl.load(norms_ptr + i)
    else:
        return gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(1, NARROW))
