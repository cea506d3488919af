# mypy: ignore-errors
"""The state before each block, made anew from those that enter segments. It needs nothing of other ranks, so it hides
the backward exchange."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import chunk_decays, head_gates, head_rate
from lasp.kernels.triton.common.program import load_chunk, rows_of, run_of, sweep_place, tile_at, view
from lasp.kernels.triton.decay.scalar.operands import value_tile
from lasp.kernels.triton.decay.scalar.sweep import BLOCK_CHUNKS, add_chunk, leave_block


@triton.jit(do_not_specialize=["T", "H", "H_v", "segments", "segment_chunks", "chunks", "blocks"])
def block_states_kernel(
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, H_v, V]
    g_ptr,  # [B, T, H_v]
    prefix_ptr,  # fp32 [B, H_v, chunks C]
    suffix_ptr,  # likewise: prefix less weights, if WEIGHS
    states_ptr,  # fp32 [B, H_v, segments, K, V], those entering each segment
    blocks_ptr,  # bf16 [B, H_v, blocks, V, K], written: S^T before each block
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    chunks,
    blocks,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    here, index, v_first = sweep_place(None, segments, segment_chunks, T, H_v, V, BV, C, False)
    run = run_of(here, H_v)
    pointers, mask = tile_at(states_ptr + index * K * V, value_tile(v_first, K, V), BV, K)
    state = tl.load(pointers, mask=mask, other=0.0)
    key_rows, value_rows = rows_of(here, T, H, H_v)
    first = here.first
    last = here.last
    k_view = view(k_ptr + key_rows * K, last, H * K, K, C, K, DESCRIPTORS)
    v_view = view(v_ptr + value_rows * V, last, H_v * V, V, C, BV, DESCRIPTORS)
    rate = head_rate(head_gates(g_ptr, here.batch, here.head, T, H_v, KIND), KIND)
    slot = run * chunks * C + here.chunk * C - first
    blocks_ptr += (run * blocks * V + v_first) * K
    for step in range(tl.cdiv(last - first, C)):
        start = first + step * C
        chunk = here.chunk + step
        leave_block(blocks_ptr + chunk // BLOCK_CHUNKS * (V * K), state, chunk % BLOCK_CHUNKS == 0)
        k = load_chunk(k_view, start, 0, last, H * K, K, C, K, DESCRIPTORS)
        v_t = tl.trans(load_chunk(v_view, start, v_first, last, H_v * V, V, C, BV, DESCRIPTORS))
        _prefix, _added, total, _read, to_state = chunk_decays(
            prefix_ptr, suffix_ptr, slot + start, rate, last - start, 1.0, KIND, C, False, False, WEIGHS
        )
        state = add_chunk(state, v_t, k, to_state, total, KIND, False, True, "tf32")
