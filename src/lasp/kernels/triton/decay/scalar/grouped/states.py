# mypy: ignore-errors
"""Sums over segments, as `summary` takes them, and states before blocks, which are made anew from those that enter
segments. The latter need nothing of other ranks, so they hide the backward exchange.

A program has heads beside one another, whose values are rows of one transposed state: keys come from L2 once for all of
them. Values come from registers, weighted, and keys as they lie in shared memory.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import load_chunk, needed_chunks, place, view
from lasp.kernels.triton.decay.scalar.sweep import BLOCK_CHUNKS


@triton.jit
def _weights(prefix_ptr, suffix_ptr, at, scale, C: tl.constexpr, REVERSE: tl.constexpr):
    """Returns by how much a chunk's tokens add to the state, [C], and the chunk's log-decay, of one head."""
    t = tl.arange(0, C)
    total = tl.load(prefix_ptr + at + C - 1)
    if REVERSE:
        weights = tl.exp2(tl.load(prefix_ptr + at + t)) * scale
    else:
        weights = tl.exp2(total - tl.load(suffix_ptr + at + t))
    return weights, total


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks", "chunks", "blocks"])
def group_states_kernel(
    keys_ptr,  # [B, T, H, K]: k, or q if REVERSE
    values_ptr,  # [B, T, H_v, V]: v, or do if REVERSE
    prefix_ptr,  # fp32 [B, H_v, chunks C]
    suffix_ptr,  # likewise: prefix less weights, if there are any
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
    C: tl.constexpr,
    HEADS: tl.constexpr,  # that a program has, of one group
    REVERSE: tl.constexpr,
    LEAVES: tl.constexpr,
    TOTAL: tl.constexpr,  # as in `summary`; always if LEAVES
    DESCRIPTORS: tl.constexpr,
):
    R: tl.constexpr = HEADS * V
    here = place(None, 1, segments, segment_chunks, T, H_v // HEADS, C, False)
    first = here.first
    last = here.last
    head = here.head * HEADS
    run = tl.cast(here.batch, tl.int64) * H_v + head
    r = tl.arange(0, R)
    h = r // V
    # Of a program's heads, each in its place.
    index = (run + h) * segments + here.segment
    d = tl.arange(0, K)
    pointers = states_ptr + (index * (K * V) + r % V)[:, None] + d[None, :] * V
    state = tl.zeros((R, K), tl.float32)
    if LEAVES:
        state = tl.load(pointers)
        blocks_at = blocks_ptr + ((run + h) * blocks * V + r % V)[:, None] * K + d[None, :]
    key_row = tl.cast(here.batch, tl.int64) * T * H + head // (H_v // H)
    keys_view = view(keys_ptr + key_row * K, last, H * K, K, C, K, DESCRIPTORS)
    values_view = view(
        values_ptr + (tl.cast(here.batch, tl.int64) * T * H_v + head) * V, last, H_v * V, R, C, R, DESCRIPTORS
    )
    slots = chunks * C
    slot = run * slots + here.chunk * C - first
    decay = tl.zeros((R,), tl.float64)
    steps = needed_chunks(None, first, last, here.ends, C, REVERSE, TOTAL, False)
    for step in range(steps):
        start = first + (steps - 1 - step if REVERSE else step) * C
        if LEAVES:
            chunk = here.chunk + step
            wanted = (chunk % BLOCK_CHUNKS == 0) & (r >= 0)
            place_here = blocks_at + chunk // BLOCK_CHUNKS * (V * K)
            tl.store(place_here, state.to(blocks_ptr.dtype.element_ty), mask=wanted[:, None])
        keys = load_chunk(keys_view, start, 0, last, H * K, K, C, K, DESCRIPTORS)
        values = load_chunk(values_view, start, 0, last, H_v * V, R, C, R, DESCRIPTORS)
        weights, total = _weights(prefix_ptr, suffix_ptr, slot + start, scale, C, REVERSE)
        weights = weights[None, :]
        if HEADS == 2:
            others, other = _weights(prefix_ptr, suffix_ptr, slot + slots + start, scale, C, REVERSE)
            weights = tl.where((h == 0)[:, None], weights, others[None, :])
            total = tl.where(h == 0, total, other)
        weighted = (tl.trans(values) * weights).to(values.dtype)
        passed = tl.exp2(total + tl.zeros((R,), tl.float32))
        state = tl.dot(weighted, keys, state * passed[:, None])
        decay += total
    if not LEAVES:
        tl.store(pointers, state)
        tl.store(decays_ptr + index, decay.to(tl.float32), mask=r % V == 0)
