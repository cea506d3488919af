"""Segment summaries: what each run of chunks adds to the state.

Forward, over k and v:           state = sum_t 2^(decay from t to the segment's end) k_t v_t^T
Backward (REVERSE), q and do:    state = sum_t scale 2^(decay from the segment's start to t) q_t do_t^T
One program walks one segment of one head, for BV columns of the state, which stays in fp32 registers.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_rows, state_tile
from lasp.kernels.triton.decay.gates import chunk_decay, head_rate


@triton.jit(do_not_specialize=["scale", "T", "H", "H_v", "segments", "segment_chunks"])
def summary_kernel(
    k_ptr,  # [B, T, H, K]; q when REVERSE
    v_ptr,  # [B, T, H_v, V]; do when REVERSE
    g_ptr,  # [H_v], [B, T, H_v] or unused
    totals_ptr,  # fp32 [B, H_v, segments, K, V], written
    decays_ptr,  # fp32 [B, H_v, segments], base 2, written
    scale,
    T,
    H,
    H_v,
    segments,
    segment_chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slices: tl.constexpr = (V + BV - 1) // BV
    v_first = (tl.program_id(0) % slices) * BV
    head_v = tl.program_id(0) // slices % H_v
    batch = tl.program_id(0) // slices // H_v
    segment = tl.program_id(1)

    first = segment * segment_chunks * C
    tokens = tl.minimum(segment_chunks * C, T - first)
    row = (batch * T + first).to(tl.int64)
    k_ptr += (row * H + head_v // (H_v // H)) * K
    v_ptr += (row * H_v + head_v) * V + v_first
    rate = head_rate(g_ptr, head_v, KIND)
    g_ptr += row * H_v + head_v

    state = tl.zeros((BK, BV), tl.float32)
    decay = 0.0
    chunks = tl.cdiv(tokens, C)
    for step in range(chunks):
        index = chunks - 1 - step if REVERSE else step
        start = tl.cast(index * C, tl.int64)
        length = tokens - index * C
        k = load_rows(k_ptr + start * H * K, H * K, length, K, C, BK, K == BK)
        v = load_rows(v_ptr + start * H_v * V, H_v * V, length, V - v_first, C, BV, V % BV == 0)
        prefix, suffix, total = chunk_decay(
            g_ptr + start * H_v, H_v, rate, tl.minimum(length, C), KIND, C
        )
        if REVERSE:
            weight = tl.exp2(prefix) * scale
        else:
            weight = tl.exp2(suffix)
        weighted = (v * weight[:, None]).to(v.dtype)
        state = tl.dot(tl.trans(k), weighted, state * tl.exp2(total), input_precision=PRECISION)
        decay += total

    out = (batch * H_v + head_v).to(tl.int64) * segments + segment
    pointers, mask = state_tile(totals_ptr + out * K * V, 0, v_first, K, V, BK, BV, False)
    tl.store(pointers, state, mask=mask)
    if v_first == 0:
        tl.store(decays_ptr + out, decay)
