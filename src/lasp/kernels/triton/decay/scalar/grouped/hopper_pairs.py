# mypy: ignore-errors
"""Pairs of tokens within blocks: `group_pairs` for Hopper. Sums over columns are left in parts, of what one warp has:
nothing but tiles that come and go makes its threads wait for one another."""

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

from lasp.kernels.triton.decay.scalar.grouped.hopper_values import SQUARE
from lasp.kernels.triton.decay.scalar.grouped.pairs import COLUMN, OTHER, OWN, ROW, SQUARES
from lasp.kernels.triton.delta.hopper.common import TOKENS, VECTOR, ask_vector, meet

STAGES = gl.constexpr(4)
WARPS, WARP_ROWS = gl.constexpr(4), gl.constexpr(16)


@gluon.jit
def _ask(
    wanted, stage, here, do_view, v_view, column, q_first, k_first, prefix_ptr, suffix_ptr, q_slot, k_slot,
    do_tiles, v_tiles, q_prefixes, k_prefixes, k_suffixes,
):  # fmt: skip
    """Ask for what one head has of both chunks."""
    barrier = here.index(stage)
    mbarrier.expect(barrier, do_tiles.shape[1] * do_tiles.shape[2] * 4, wanted)
    tma.async_copy_global_to_shared(do_view, [q_first, column], barrier, do_tiles.index(stage), wanted)
    tma.async_copy_global_to_shared(v_view, [k_first, column], barrier, v_tiles.index(stage), wanted)
    ask_vector(q_prefixes.index(stage), prefix_ptr + q_slot, wanted)
    ask_vector(k_prefixes.index(stage), prefix_ptr + k_slot, wanted)
    ask_vector(k_suffixes.index(stage), suffix_ptr + k_slot, wanted)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["scale", "B", "T", "H", "H_v", "chunks", "blocks"])
def group_hopper_pairs_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    do_ptr,  # [B, T, H_v, V]
    prefix_ptr,  # fp32 [B, H_v, chunks C]
    suffix_ptr,  # likewise: prefix less weights, if WEIGHS
    pairs_ptr,  # [B, H, blocks, 2 C, 2 C], written but for what lies above the diagonal: sums of z over heads
    sums_ptr,  # fp32 [SUMS, B, H_v, chunks C], written: all but reads
    scores_ptr,  # fp32 [B, H, chunks C], written if WEIGHS: scale q . k of each token's own
    scale,
    B,
    T,
    H,
    H_v,
    chunks,
    blocks,
    K: gl.constexpr,
    V: gl.constexpr,
    WEIGHS: gl.constexpr,
):
    """A program for two chunks, that of queries and that of keys."""
    dtype: gl.constexpr = v_ptr.dtype.element_ty
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, K], dtype)
    values: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, V], dtype)
    square = gl.program_id(0) % SQUARES
    key_run = (gl.program_id(0) // SQUARES).to(gl.int64)
    batch = key_run // H
    block = gl.program_id(1)
    of_q = 2 * block + gl.where(square > 0, 1, 0)
    of_k = 2 * block + gl.where(square == 2, 1, 0)
    if of_q < chunks:
        do_tiles = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, V], values)
        v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, V], values)
        q_prefixes = gl.allocate_shared_memory(gl.float32, [STAGES, TOKENS], VECTOR)
        k_prefixes = gl.allocate_shared_memory(gl.float32, [STAGES, TOKENS], VECTOR)
        k_suffixes = gl.allocate_shared_memory(gl.float32, [STAGES, TOKENS], VECTOR)
        here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        keys_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for n in gl.static_range(STAGES):
            mbarrier.init(here.index(n), 1)
        mbarrier.init(keys_here, 1)
        fence_async_shared()
        meet()
        i = gl.arange(0, TOKENS, gl.SliceLayout(1, SQUARE))
        j = gl.arange(0, TOKENS, gl.SliceLayout(0, SQUARE))
        nothing = gl.zeros([TOKENS, TOKENS], gl.float32, SQUARE)
        group = H_v // H
        head = (key_run % H).to(gl.int32) * group
        run = batch * H_v + head
        row = H_v * V
        apart = square == 1
        q_first, k_first = of_q * TOKENS, of_k * TOKENS
        q_slot, k_slot = (run * chunks + of_q) * TOKENS, (run * chunks + of_k) * TOKENS
        do_view = tma.make_tensor_descriptor(do_ptr + batch * T * row, [T, row], [row, 1], [TOKENS, V], values)
        v_view = tma.make_tensor_descriptor(v_ptr + batch * T * row, [T, row], [row, 1], [TOKENS, V], values)
        # In the place of what is asked for after them.
        of_keys = do_tiles._reinterpret(dtype, [STAGES * V // K, TOKENS, K], keys)
        key_row = batch * T * H + key_run % H
        q_view = tma.make_tensor_descriptor(q_ptr + key_row * K, [T, K], [H * K, 1], [TOKENS, K], keys)
        k_view = tma.make_tensor_descriptor(k_ptr + key_row * K, [T, K], [H * K, 1], [TOKENS, K], keys)
        mbarrier.expect(keys_here, 2 * TOKENS * K * 2)
        tma.async_copy_global_to_shared(q_view, [q_first, 0], keys_here, of_keys.index(0))
        tma.async_copy_global_to_shared(k_view, [k_first, 0], keys_here, of_keys.index(1))
        mbarrier.wait(keys_here, 0)
        products = warpgroup_mma(
            of_keys.index(0), of_keys.index(1).permute((1, 0)), nothing, use_acc=False, is_async=True
        )  # fmt: skip
        products = warpgroup_mma_wait(0, [products]) * scale
        meet()
        for n in gl.static_range(STAGES - 1):
            _ask(
                n < group, n, here, do_view, v_view, (head + n) * V, q_first, k_first, prefix_ptr, suffix_ptr,
                q_slot + n * chunks * TOKENS, k_slot + n * chunks * TOKENS,
                do_tiles, v_tiles, q_prefixes, k_prefixes, k_suffixes,
            )  # fmt: skip
        if WEIGHS:
            own = gl.sum(gl.where(i[:, None] == j[None, :], products, 0.0), 1)
            gl.store(scores_ptr + (key_run * chunks + of_q) * TOKENS + i, own, mask=(i >= 0) & (square != 1))
        # A token's own pair, and those that are none, are in no sum.
        products = gl.where(apart | (i[:, None] > j[None, :]), products, 0.0)
        rows = B.to(gl.int64) * H_v * chunks * TOKENS
        row_ptr = sums_ptr + rows * gl.where(apart, OTHER, ROW) + q_slot + i
        sums_of_own = sums_ptr + rows * OWN + q_slot + i
        column_ptr = sums_ptr + rows * gl.where(apart, OTHER, COLUMN) + k_slot
        total = nothing
        for h in range(group):
            stage = h % STAGES
            async_copy.wait_group(STAGES - 2)
            mbarrier.wait(here.index(stage), h // STAGES & 1)
            meet()
            ahead = h + STAGES - 1
            _ask(
                ahead < group, ahead % STAGES, here, do_view, v_view, (head + ahead) * V, q_first, k_first, prefix_ptr,
                suffix_ptr, q_slot + ahead * chunks * TOKENS, k_slot + ahead * chunks * TOKENS,
                do_tiles, v_tiles, q_prefixes, k_prefixes, k_suffixes,
            )  # fmt: skip
            z = warpgroup_mma(
                do_tiles.index(stage), v_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )  # fmt: skip
            before = k_prefixes.index(stage)
            passed = gl.sum(
                before.slice(TOKENS - 1, 1).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0
            )  # fmt: skip
            prefix = q_prefixes.index(stage).load(gl.SliceLayout(1, SQUARE)) + gl.where(apart, passed, 0.0)
            # Of pairs that are none it would have no bound; of others a later prefix is the less.
            log2 = gl.minimum(prefix[:, None], before.load(gl.SliceLayout(0, SQUARE))[None, :])
            decays = gl.exp2(log2 - k_suffixes.index(stage).load(gl.SliceLayout(0, SQUARE))[None, :])
            z = warpgroup_mma_wait(0, [z])
            if WEIGHS:
                own = gl.sum(gl.where(i[:, None] == j[None, :], z, 0.0), 1)
                gl.store(sums_of_own, own, mask=(i >= 0) & (square != 1))
            z *= decays
            total += z
            w = z * products
            gl.store(row_ptr, gl.sum(w, 1))
            parts = gl.sum(w.reshape([WARPS, WARP_ROWS, TOKENS]), 1)
            part = gl.arange(0, WARPS, gl.SliceLayout(1, parts.type.layout))
            of_part = gl.arange(0, TOKENS, gl.SliceLayout(0, parts.type.layout))
            gl.store(column_ptr + part[:, None] * rows + of_part[None, :], parts)
            row_ptr += chunks * TOKENS
            sums_of_own += chunks * TOKENS
            column_ptr += chunks * TOKENS
        for n in gl.static_range(STAGES):
            mbarrier.invalidate(here.index(n))
        mbarrier.invalidate(keys_here)
        pairs_ptr += (key_run * blocks + block) * (4 * TOKENS * TOKENS)
        at = ((of_q - 2 * block) * TOKENS + i)[:, None] * (2 * TOKENS) + ((of_k - 2 * block) * TOKENS + j)[None, :]
        total = gl.where(apart | (i[:, None] >= j[None, :]), total * scale, 0.0)
        gl.store(pairs_ptr + at, total.to(pairs_ptr.dtype.element_ty))
