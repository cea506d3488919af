# mypy: ignore-errors
"""Sweep over segments for outputs, and for the gradient of v with D after every block: `output` and `value_gradient`
for Hopper, of heads that share q and k, and have 64 values.

    out = from_state a S + P c        (legend: `sweep`), P_ab = scale L_ab (a . b), and the skip where a is b

In flight together are, of a chunk, products between tokens and with S; then that with P, which stays in registers, and
what the chunk adds to the state. S is kept transposed in registers, and lies rounded in shared memory.
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

from lasp.kernels.triton.delta.hopper.common import (
    TOKENS,
    VECTOR,
    afresh,
    ask_vector,
    last_of,
    meet,
    segment_of,
    tokens_view,
)

# Results of products between tokens, and of tokens and values; states [V, K]. By four warps.
SQUARE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SQUARE_LEFT = gl.constexpr(gl.DotOperandLayout(0, SQUARE, 2))


@gluon.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks", "blocks"])
def group_hopper_values_kernel(
    a_ptr,  # [B, T, H, K]: q, or k if REVERSE
    b_ptr,  # [B, T, H, K]: k, or q if REVERSE
    c_ptr,  # [B, T, H_v, V]: v, or do if REVERSE
    prefix_ptr,  # fp32 [B, H_v, chunks C]
    suffix_ptr,  # likewise: prefix less weights, if there are any
    out_ptr,  # [B, T, H_v, V], written: o, or dv if REVERSE
    states_ptr,  # fp32 [B, H_v, segments, K, V]: those at the segments' starts (ends) from zero; see outside_ptr
    decays_ptr,  # fp32 [B, H_v, segments]: decay from the run's start (end) to each segment
    state_out_ptr,  # fp32 [B, H_v, K, V], written unless REVERSE
    skip_ptr,  # fp32 [H_v], if WEIGHS
    blocks_ptr,  # [B, H_v, blocks, V, K], written if REVERSE: D^T after each block of two chunks
    outside_ptr,  # fp32 [B, H_v, K, V], what enters the run, or None for zero; unless REVERSE states_ptr gets its part
    scale,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    chunks,
    blocks,
    K: gl.constexpr,
    V: gl.constexpr,
    REVERSE: gl.constexpr,
    WEIGHS: gl.constexpr,
):
    dtype: gl.constexpr = c_ptr.dtype.element_ty
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, K], dtype)
    values: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, V], dtype)
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    STATE_LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    expected: gl.constexpr = 2 * TOKENS * K * 2 + TOKENS * V * 2
    a_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, K], keys)
    b_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, K], keys)
    c_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, V], values)
    s_tiles = gl.allocate_shared_memory(dtype, [1, V, K], keys)  # S^T
    out_tiles = gl.allocate_shared_memory(dtype, [1, TOKENS, V], values)
    prefixes = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    suffixes = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR)
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, SQUARE))
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, SQUARE))
    r = gl.arange(0, V, gl.SliceLayout(1, STATE))
    d = gl.arange(0, K, gl.SliceLayout(0, STATE))
    nothing = gl.zeros([TOKENS, TOKENS], gl.float32, SQUARE)

    head, batch, first, last, chunk, border, ends = segment_of(
        gl.program_id(0), None, T, H_v, segments, segment_chunks, False
    )  # fmt: skip
    key_row = batch * T * H + head // (H_v // H)
    row = batch * T * H_v + head
    run = batch * H_v + head
    count = (last - first + TOKENS - 1) // TOKENS
    step: gl.constexpr = -TOKENS if REVERSE else TOKENS
    start = first + (count - 1) * TOKENS if REVERSE else first
    at = (run * chunks + chunk) * TOKENS + start - first

    index = run * segments + gl.program_id(1)
    place = states_ptr + index * K * V + (r[:, None] + d[None, :] * V)
    state = gl.load(place)
    if outside_ptr is not None:
        passed = gl.exp2(gl.load(decays_ptr + index))
        state += passed * gl.load(outside_ptr + border * K * V + (r[:, None] + d[None, :] * V))
        if not REVERSE:
            gl.store(place, state)
    skip = 0.0
    if WEIGHS:
        skip = gl.load(skip_ptr + head)
    here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(here, 1)
    fence_async_shared()
    meet()
    a_view = tokens_view(a_ptr + key_row * K, H * K, last, K, keys)
    b_view = tokens_view(b_ptr + key_row * K, H * K, last, K, keys)
    c_view = tokens_view(c_ptr + row * V, H_v * V, last, V, values)
    out_view = tokens_view(out_ptr + row * V, H_v * V, last, V, values)
    if REVERSE:
        blocks_view = tma.make_tensor_descriptor(
            blocks_ptr + run * blocks * (V * K), [blocks * V, K], [K, 1], [V, K], keys
        )
    mbarrier.expect(here, expected)
    tma.async_copy_global_to_shared(a_view, [start, 0], here, a_tiles.index(0))
    tma.async_copy_global_to_shared(b_view, [start, 0], here, b_tiles.index(0))
    tma.async_copy_global_to_shared(c_view, [start, 0], here, c_tiles.index(0))
    ask_vector(prefixes.index(0), prefix_ptr + at, count > 0)
    ask_vector(suffixes.index(0), suffix_ptr + at, count > 0)
    async_copy.commit_group()
    for n in range(count):
        tma.store_wait(0)
        if REVERSE:  # which stores from there
            meet()
        s_tiles.index(0).store(state.to(dtype))
        fence_async_shared()
        async_copy.wait_group(0)
        mbarrier.wait(here, n & 1)
        meet()
        following = start + step
        more = n + 1 < count
        ahead = (n + 1) & 1
        mbarrier.expect(here, expected, more)
        tma.async_copy_global_to_shared(a_view, [following, 0], here, a_tiles.index(ahead), more)
        tma.async_copy_global_to_shared(b_view, [following, 0], here, b_tiles.index(ahead), more)
        tma.async_copy_global_to_shared(c_view, [following, 0], here, c_tiles.index(ahead), more)
        ask_vector(prefixes.index(ahead), prefix_ptr + at + step, more)
        ask_vector(suffixes.index(ahead), suffix_ptr + at + step, more)
        async_copy.commit_group()
        if REVERSE:
            number = chunk + count - 1 - n
            if (number % 2 == 1) | (start + TOKENS >= T):
                tma.async_copy_shared_to_global(blocks_view, [number // 2 * V, 0], s_tiles.index(0))
        now, only = afresh(n & 1), afresh(0)
        a_tile, b_tile, c_tile = a_tiles.index(now), b_tiles.index(now), c_tiles.index(now)
        scores = warpgroup_mma(a_tile, b_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        out = warpgroup_mma(a_tile, s_tiles.index(only).permute((1, 0)), nothing, use_acc=False, is_async=True)
        prefix, suffix = prefixes.index(n & 1), suffixes.index(n & 1)
        total = last_of(prefix)
        if REVERSE:
            of_a, of_b = suffix.load(gl.SliceLayout(1, SQUARE)), prefix.load(gl.SliceLayout(0, SQUARE))
            pairs = gl.where(j[None, :] >= i[:, None], gl.exp2(of_b[None, :] - of_a[:, None]) * scale, 0.0)
            from_state = gl.exp2(total - of_a)
            to_state = gl.exp2(prefix.load(gl.SliceLayout(0, STATE_LEFT))) * scale
        else:
            of_a, of_b = prefix.load(gl.SliceLayout(1, SQUARE)), suffix.load(gl.SliceLayout(0, SQUARE))
            pairs = gl.where(i[:, None] >= j[None, :], gl.exp2(of_a[:, None] - of_b[None, :]) * scale, 0.0)
            from_state = gl.exp2(of_a) * scale
            to_state = gl.exp2(total - suffix.load(gl.SliceLayout(0, STATE_LEFT)))
        weighted = (c_tile.permute((1, 0)).load(STATE_LEFT).to(gl.float32) * to_state[None, :]).to(dtype)
        scores, out = warpgroup_mma_wait(0, [scores, out])
        state *= gl.exp2(total)
        state = warpgroup_mma(weighted, b_tile, state, is_async=True)
        scores *= pairs
        if WEIGHS:
            scores += gl.where(i[:, None] == j[None, :], skip, 0.0)
        out *= from_state[:, None]
        out = warpgroup_mma(gl.convert_layout(scores.to(dtype), SQUARE_LEFT), c_tile, out, is_async=True)
        state, out = warpgroup_mma_wait(0, [state, out])
        out_tiles.index(0).store(out.to(dtype))
        fence_async_shared()
        meet()
        tma.async_copy_shared_to_global(out_view, [start, 0], out_tiles.index(0))
        start = following
        at += step
    tma.store_wait(0)
    mbarrier.invalidate(here)
    if not REVERSE:  # noqa: SIM102  (known, and not known, to the compiler)
        if ends:
            gl.store(state_out_ptr + border * K * V + (afresh(0) + r[:, None] + d[None, :] * V), state)
