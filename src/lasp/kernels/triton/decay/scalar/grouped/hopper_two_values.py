# mypy: ignore-errors
"""Sweep over segments for outputs, and for the gradient of v with D after every block: `output` and `value_gradient`
for Hopper, of heads that share q and k, and have 64 values.

    out = from_state a S + P c        (legend: `sweep`), P_ab = scale L_ab (a . b), and the skip where a is b

A program has two heads: q and k come from L2 once for both, and products between tokens are made once. In flight
together are, of a chunk, those and the ones with S; then those with P and what the chunk adds to the states. S is kept
transposed in registers, and lies rounded in shared memory.
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

# Results of products between tokens, and of tokens and values; by eight warps.
SQUARE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))


@gluon.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks", "blocks"])
def group_hopper_two_values_kernel(
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
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, K // 2, 16])
    STATE_LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    expected: gl.constexpr = 2 * TOKENS * K * 2 + 2 * TOKENS * V * 2
    a_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, K], keys)
    b_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, K], keys)
    # Of these, and of the vectors, both heads' beside one another.
    c_tiles = gl.allocate_shared_memory(dtype, [4, TOKENS, V], values)
    s_tiles = gl.allocate_shared_memory(dtype, [2, V, K], keys)  # S^T
    p_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, TOKENS], values)
    out_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, V], values)
    prefixes = gl.allocate_shared_memory(gl.float32, [4, TOKENS], VECTOR)
    suffixes = gl.allocate_shared_memory(gl.float32, [4, TOKENS], VECTOR)
    r = gl.arange(0, V, gl.SliceLayout(1, STATE))
    d = gl.arange(0, K, gl.SliceLayout(0, STATE))
    nothing = gl.zeros([TOKENS, TOKENS], gl.float32, SQUARE)

    half, batch, first, last, chunk, border, ends = segment_of(
        gl.program_id(0), None, T, H_v // 2, segments, segment_chunks, False
    )  # fmt: skip
    head = 2 * half
    border = batch * H_v + head
    key_row = batch * T * H + head // (H_v // H)
    run = batch * H_v + head
    row = H_v * V
    slots = chunks * TOKENS
    count = (last - first + TOKENS - 1) // TOKENS
    step: gl.constexpr = -TOKENS if REVERSE else TOKENS
    start = first + (count - 1) * TOKENS if REVERSE else first
    at = (run * chunks + chunk) * TOKENS + start - first

    index = run * segments + gl.program_id(1)
    of_state = r[:, None] + d[None, :] * V
    first_place = states_ptr + index * K * V + of_state
    second_place = first_place + segments * K * V
    first_state = gl.load(first_place)
    second_state = gl.load(second_place)
    if outside_ptr is not None:
        outside = outside_ptr + border * K * V + of_state
        first_state += gl.exp2(gl.load(decays_ptr + index)) * gl.load(outside)
        second_state += gl.exp2(gl.load(decays_ptr + index + segments)) * gl.load(outside + K * V)
        if not REVERSE:
            gl.store(first_place, first_state)
            gl.store(second_place, second_state)
    first_skip = 0.0
    second_skip = 0.0
    if WEIGHS:
        first_skip = gl.load(skip_ptr + head)
        second_skip = gl.load(skip_ptr + head + 1)
    here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(here, 1)
    fence_async_shared()
    meet()
    a_view = tokens_view(a_ptr + key_row * K, H * K, last, K, keys)
    b_view = tokens_view(b_ptr + key_row * K, H * K, last, K, keys)
    c_view = tma.make_tensor_descriptor(c_ptr + batch * T * row, [last, row], [row, 1], [TOKENS, V], values)
    out_view = tma.make_tensor_descriptor(out_ptr + batch * T * row, [last, row], [row, 1], [TOKENS, V], values)
    if REVERSE:
        blocks_view = tma.make_tensor_descriptor(
            blocks_ptr + run * blocks * (V * K), [2 * blocks * V, K], [K, 1], [V, K], keys
        )
    mbarrier.expect(here, expected)
    tma.async_copy_global_to_shared(a_view, [start, 0], here, a_tiles.index(0))
    tma.async_copy_global_to_shared(b_view, [start, 0], here, b_tiles.index(0))
    for h in gl.static_range(2):
        tma.async_copy_global_to_shared(c_view, [start, (head + h) * V], here, c_tiles.index(h))
        ask_vector(prefixes.index(h), prefix_ptr + at + h * slots, count > 0)
        ask_vector(suffixes.index(h), suffix_ptr + at + h * slots, count > 0)
    async_copy.commit_group()
    for n in range(count):
        tma.store_wait(0)
        meet()
        s_tiles.index(0).store(first_state.to(dtype))
        s_tiles.index(1).store(second_state.to(dtype))
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
        for h in gl.static_range(2):
            place = 2 * ahead + h
            tma.async_copy_global_to_shared(c_view, [following, (head + h) * V], here, c_tiles.index(place), more)
            ask_vector(prefixes.index(place), prefix_ptr + at + h * slots + step, more)
            ask_vector(suffixes.index(place), suffix_ptr + at + h * slots + step, more)
        async_copy.commit_group()
        if REVERSE:
            number = chunk + count - 1 - n
            if (number % 2 == 1) | (start + TOKENS >= T):
                tma.async_copy_shared_to_global(blocks_view, [number // 2 * V, 0], s_tiles.index(0))
                tma.async_copy_shared_to_global(blocks_view, [(blocks + number // 2) * V, 0], s_tiles.index(1))
        now, only = afresh(n & 1), afresh(0)
        a_tile, b_tile = a_tiles.index(now), b_tiles.index(now)
        scores = warpgroup_mma(a_tile, b_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        first_out = warpgroup_mma(
            a_tile, s_tiles.index(only).permute((1, 0)), nothing, use_acc=False, is_async=True
        )  # fmt: skip
        second_out = warpgroup_mma(
            a_tile, s_tiles.index(only + 1).permute((1, 0)), nothing, use_acc=False, is_async=True
        )  # fmt: skip
        place = 2 * (n & 1)
        pairs, first_from, first_to, first_passed = _decays(
            prefixes.index(place), suffixes.index(place), scale, REVERSE, STATE_LEFT
        )  # fmt: skip
        others, second_from, second_to, second_passed = _decays(
            prefixes.index(place + 1), suffixes.index(place + 1), scale, REVERSE, STATE_LEFT
        )  # fmt: skip
        first_weighted = c_tiles.index(place).permute((1, 0)).load(STATE_LEFT).to(gl.float32) * first_to[None, :]
        second_weighted = c_tiles.index(place + 1).permute((1, 0)).load(STATE_LEFT).to(gl.float32) * second_to[None, :]
        scores, first_out, second_out = warpgroup_mma_wait(0, [scores, first_out, second_out])
        first_state *= first_passed
        second_state *= second_passed
        first_state = warpgroup_mma(first_weighted.to(dtype), b_tile, first_state, is_async=True)
        second_state = warpgroup_mma(second_weighted.to(dtype), b_tile, second_state, is_async=True)
        p_tiles.index(0).store(_scored(scores, pairs, first_skip, WEIGHS).to(dtype))
        p_tiles.index(1).store(_scored(scores, others, second_skip, WEIGHS).to(dtype))
        first_out *= first_from[:, None]
        second_out *= second_from[:, None]
        fence_async_shared()
        meet()
        only = afresh(0)
        place = 2 * afresh(n & 1)
        first_out = warpgroup_mma(p_tiles.index(only), c_tiles.index(place), first_out, is_async=True)
        second_out = warpgroup_mma(p_tiles.index(only + 1), c_tiles.index(place + 1), second_out, is_async=True)
        first_state, second_state, first_out, second_out = warpgroup_mma_wait(
            0, [first_state, second_state, first_out, second_out]
        )  # fmt: skip
        out_tiles.index(0).store(first_out.to(dtype))
        out_tiles.index(1).store(second_out.to(dtype))
        fence_async_shared()
        meet()
        for h in gl.static_range(2):
            tma.async_copy_shared_to_global(out_view, [start, (head + h) * V], out_tiles.index(h))
        start = following
        at += step
    tma.store_wait(0)
    mbarrier.invalidate(here)
    if not REVERSE:  # noqa: SIM102  (known, and not known, to the compiler)
        if ends:
            leaving = state_out_ptr + border * K * V + (afresh(0) + of_state)
            gl.store(leaving, first_state)
            gl.store(leaving + K * V, second_state)


@gluon.jit
def _decays(prefix, suffix, scale, REVERSE: gl.constexpr, STATE_LEFT: gl.constexpr):
    """A chunk's decays between its tokens, from the state to them and from them to the state; and that of it all."""
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, SQUARE))
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, SQUARE))
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
    return pairs, from_state, to_state, gl.exp2(total)


@gluon.jit
def _scored(scores, pairs, skip, WEIGHS: gl.constexpr):
    """P of a head."""
    i = gl.arange(0, TOKENS, gl.SliceLayout(1, SQUARE))
    j = gl.arange(0, TOKENS, gl.SliceLayout(0, SQUARE))
    found = scores * pairs
    if WEIGHS:
        found += gl.where(i[:, None] == j[None, :], skip, 0.0)
    return found
