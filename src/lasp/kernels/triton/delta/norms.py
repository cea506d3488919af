# mypy: ignore-errors
"""Queries and keys of length 1, without writing them: the factors, and what these do to gradients.

Rounded to 16 bits a key would be too long or too short by up to 0.4 %, and where beta is 2 the state would grow. So
kernels multiply by the factor n = (x.x + eps)^-1/2 wherever they weight a token anyway, and find the gradient e of x as
if n were a constant. Then dx = e - n^2 x (x.e).
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import DESCRIPTORS, chunk_place, load_chunk, store_chunk


@triton.jit
def _place(places_ptr, T, H, chunks, C: tl.constexpr, PACKED: tl.constexpr):
    """The place of a program that has a chunk of a head: first token, the one after the last, batch, head and slot."""
    first, last = chunk_place(places_ptr, tl.program_id(0), T, C, PACKED)
    head = tl.program_id(1) % H
    batch = tl.cast(tl.program_id(1) // H, tl.int64)
    return first, last, batch, head, ((batch * H + head) * chunks + tl.program_id(0)) * C


@triton.jit(do_not_specialize=["eps", "T", "H", "chunks"])
def norms_kernel(
    x_ptr,  # [B, T, H, K]
    norms_ptr,  # fp32 [B, H, chunks C], written
    places_ptr,  # int32 [chunks, 4] if PACKED
    eps,
    T,
    H,
    chunks,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
):
    first, last, batch, head, slot = _place(places_ptr, T, H, chunks, C, PACKED)
    x = load_chunk(x_ptr + (batch * T * H + head) * K, first, 0, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32)
    tl.store(norms_ptr + slot + tl.arange(0, C), 1.0 / tl.sqrt(tl.sum(x * x, 1) + eps))


@triton.jit(do_not_specialize=["T", "H", "H_v", "chunks"])
def key_gradient_sum_kernel(
    x_ptr,  # [B, T, H, K]; unused unless NORMALIZE
    partial_ptr,  # [B, T, H_v, K]
    gradient_ptr,  # [B, T, H, K], written
    places_ptr,  # int32 [chunks, 4] if PACKED
    norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE, else None
    T,
    H,
    H_v,
    chunks,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Sums the gradients of a group's value heads."""
    first, last, batch, head, slot = _place(places_ptr, T, H, chunks, C, PACKED)
    groups = H_v // H
    partial_ptr += (batch * T * H_v + head * groups) * K
    gradient = tl.zeros((C, BK), tl.float32)
    for member in range(groups):
        gradient += load_chunk(partial_ptr + member * K, first, 0, last, H_v * K, K, C, BK, DESCRIPTORS)
    own = (batch * T * H + head) * K
    if norms_ptr is not None:
        norms = tl.load(norms_ptr + slot + tl.arange(0, C))
        x = load_chunk(x_ptr + own, first, 0, last, H * K, K, C, BK, DESCRIPTORS).to(tl.float32)
        gradient -= x * (norms * norms * tl.sum(x * gradient, 1))[:, None]
    gradient = gradient.to(gradient_ptr.dtype.element_ty)
    store_chunk(gradient_ptr + own, gradient, first, 0, last, H * K, K, C, BK, DESCRIPTORS)
