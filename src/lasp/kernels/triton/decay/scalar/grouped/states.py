# mypy: ignore-errors
"""Sums over segments, as `summary` takes them, and states before blocks, which are made anew from those that enter
segments. The latter need nothing of other ranks, so they hide the backward exchange.

A program holds the transposed state: values come from registers, weighted, and keys as they lie in shared memory.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import chunk_decays, head_gates, head_rate
from lasp.kernels.triton.common.program import (
    load_chunk,
    needed_chunks,
    rows_of,
    run_of,
    sweep_place,
    tile_at,
    view,
)
from lasp.kernels.triton.decay.scalar.operands import value_tile
from lasp.kernels.triton.decay.scalar.sweep import BLOCK_CHUNKS, add_chunk, leave_block


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks", "blocks"])
def group_states_kernel(
    keys_ptr,  # [B, T, H, K]: k, or q if REVERSE
    values_ptr,  # [B, T, H_v, V]: v, or do if REVERSE
    g_ptr,  # [B, T, H_v]
    prefix_ptr,  # fp32 [B, H_v, chunks C]
    suffix_ptr,  # likewise: prefix less weights, if WEIGHS
    states_ptr,  # fp32 [B, H_v, segments, K, V], written; if LEAVES read: those entering each segment
    decays_ptr,  # fp32 [B, H_v, segments], base 2, written unless LEAVES
    blocks_ptr,  # bf16 [B, H_v, blocks, V, K], written if LEAVES: S^T before each block
    scale,
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
    REVERSE: tl.constexpr,
    LEAVES: tl.constexpr,
    TOTAL: tl.constexpr,  # as in `summary`; always if LEAVES
    DESCRIPTORS: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    here, index, v_first = sweep_place(None, segments, segment_chunks, T, H_v, V, BV, C, False)
    run = run_of(here, H_v)
    pointers, mask = tile_at(states_ptr + index * K * V, value_tile(v_first, K, V), BV, K)
    state = tl.zeros((BV, K), tl.float32)
    if LEAVES:
        state = tl.load(pointers, mask=mask, other=0.0)
        blocks_ptr += (run * blocks * V + v_first) * K
    key_rows, value_rows = rows_of(here, T, H, H_v)
    first = here.first
    last = here.last
    keys_view = view(keys_ptr + key_rows * K, last, H * K, K, C, K, DESCRIPTORS)
    values_view = view(values_ptr + value_rows * V, last, H_v * V, V, C, BV, DESCRIPTORS)
    rate = head_rate(head_gates(g_ptr, here.batch, here.head, T, H_v, KIND), KIND)
    slot = run * chunks * C + here.chunk * C - first
    decay = tl.full((), 0.0, tl.float64)
    steps = needed_chunks(None, first, last, here.ends, C, REVERSE, TOTAL, False)
    for step in range(steps):
        start = first + (steps - 1 - step if REVERSE else step) * C
        if LEAVES:
            chunk = here.chunk + step
            leave_block(blocks_ptr + chunk // BLOCK_CHUNKS * (V * K), state, chunk % BLOCK_CHUNKS == 0)
        keys = load_chunk(keys_view, start, 0, last, H * K, K, C, K, DESCRIPTORS)
        values_t = tl.trans(load_chunk(values_view, start, v_first, last, H_v * V, V, C, BV, DESCRIPTORS))
        _prefix, _added, total, _read, to_state = chunk_decays(
            prefix_ptr, suffix_ptr, slot + start, rate, last - start, scale, KIND, C, REVERSE, False, WEIGHS
        )
        state = add_chunk(state, values_t, keys, to_state, total, KIND, REVERSE, False, "tf32")
        decay += total
    if not LEAVES:
        tl.store(pointers, state, mask=mask)
        if v_first == 0:
            tl.store(decays_ptr + index, decay.to(tl.float32))
