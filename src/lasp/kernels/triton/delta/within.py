"""What the gradients of a chunk have of products over V, whatever the gate."""

import triton
import triton.language as tl

from lasp.kernels.triton.common.tiles import load_chunk
from lasp.kernels.triton.decay.channel_gates import DESCRIPTORS


@triton.jit
def products_over_values(
    do_ptr,  # these at [B, T, H_v, V] of the batch and head
    u_ptr,
    dv_ptr,
    s_chunk_ptr,  # [rows, COLUMNS]: S^T at the chunk's start
    d_chunk_ptr,  # likewise: D^T at its end
    first,
    last,
    row,
    column,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """do u^T, u do^T, dv u^T and u dv^T, [C, C]; do S^T, dv S^T and u D^T, [C, BK]; S * D summed over V, [BK].

    BV columns at a time. Transposes are products of their own: see docs/kernels.md on transposed accumulators.
    """
    z = tl.zeros((C, C), tl.float32)
    z_t = tl.zeros((C, C), tl.float32)
    m = tl.zeros((C, C), tl.float32)
    m_t = tl.zeros((C, C), tl.float32)
    read_q = tl.zeros((C, BK), tl.float32)
    read_k = tl.zeros((C, BK), tl.float32)
    of_state = tl.zeros((C, BK), tl.float32)
    passed = tl.zeros((BK,), tl.float32)
    for v in range(0, V, BV):
        u = load_chunk(u_ptr, first, v, last, row, V, C, BV, DESCRIPTORS)
        do = load_chunk(do_ptr, first, v, last, row, V, C, BV, DESCRIPTORS)
        dv = load_chunk(dv_ptr, first, v, last, row, V, C, BV, DESCRIPTORS)
        state = load_chunk(s_chunk_ptr, v, column, V, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS)
        d_state = load_chunk(d_chunk_ptr, v, column, V, COLUMNS, COLUMNS, BV, BK, DESCRIPTORS)
        passed += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
        z = tl.dot(do, tl.trans(u), z, input_precision=PRECISION)
        z_t = tl.dot(u, tl.trans(do), z_t, input_precision=PRECISION)
        m = tl.dot(dv, tl.trans(u), m, input_precision=PRECISION)
        m_t = tl.dot(u, tl.trans(dv), m_t, input_precision=PRECISION)
        read_q = tl.dot(do, state, read_q, input_precision=PRECISION)
        read_k = tl.dot(dv, state, read_k, input_precision=PRECISION)
        of_state = tl.dot(u, d_state, of_state, input_precision=PRECISION)
    return z, z_t, m, m_t, read_q, read_k, of_state, passed


@triton.jit
def store_d_beta(d_beta_ptr, beta_ptr, m, first, last, H_v, C: tl.constexpr):
    """From dv u^T: u is beta times what was missing, dv beta times its gradient."""
    t = tl.arange(0, C)
    beta = tl.load(beta_ptr + t)
    d_beta = tl.sum(tl.where(t[:, None] == t[None, :], m, 0.0), 1) / beta / beta
    tl.store(d_beta_ptr + tl.cast(first + t, tl.int64) * H_v, d_beta, mask=first + t < last)
