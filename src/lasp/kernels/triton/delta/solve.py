# mypy: ignore-errors
"""A - I of every chunk and value head, A = (I + diag(beta) L)^-1; and beta laid out as the sweeps read it.

Blocks on the diagonal are inverted by substitution, all at once; pairs of blocks are merged by products. A series of
the inverse instead (of L, L^2, L^4, ..) would overflow where keys are alike and beta is near 2, and so would an inverse
without the decays in it, where these keep beta k.k > 2 in check.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import CHANNEL, NONE, TOKEN
from lasp.kernels.triton.common.program import chunk_place
from lasp.kernels.triton.delta.chunk import MIN_BETA, between

BLOCK = tl.constexpr(16)


@triton.jit(do_not_specialize=["T", "H", "H_v", "chunks"])
def solve_kernel(
    k_ptr,  # [B, T, H, K]; unused if CHANNEL
    norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    overlaps_ptr,  # fp32 [B, H_v, chunks, C, C] if CHANNEL: L
    beta_ptr,  # fp32 [B, T, H_v]
    g_ptr,  # fp32 [B, T, H_v] if TOKEN
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN
    inverse_ptr,  # [B, H_v, chunks, C, C], written
    betas_ptr,  # fp32 [B, H_v, chunks C], written
    places_ptr,  # int32 [chunks, 3] if PACKED
    T,
    H,
    H_v,
    chunks,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0)
    first, last = chunk_place(places_ptr, chunk, T, C, PACKED)
    head = tl.program_id(1) % H_v
    batch = tl.cast(tl.program_id(1) // H_v, tl.int64)
    run = batch * H_v + head
    key_head = head // (H_v // H)
    slot = (run * chunks + chunk) * C
    k_ptr += (batch * T * H + tl.cast(first, tl.int64) * H + key_head) * K
    norms_ptr += ((batch * H + key_head) * chunks + chunk) * C
    overlaps_ptr += slot * C
    beta_ptr += (batch * T + first) * H_v + head
    g_ptr += batch * T * H_v + head
    prefix_ptr += slot
    inverse_ptr += slot * C
    length = last - first

    i = tl.arange(0, C)
    tl.store(betas_ptr + slot + i, _betas(beta_ptr, i, length, H_v))

    if C < 4 * BLOCK:
        # Small chunks: one block, whose gates are summed between tokens.
        late = tl.arange(0, C)[None, :]
        overlaps = _overlaps(k_ptr, norms_ptr, overlaps_ptr, prefix_ptr, late, late, length, H * K, K, BK, C, NONE
                             if KIND == TOKEN else KIND, NORMALIZE, PRECISION)  # fmt: skip
        if KIND == TOKEN:
            prefix = tl.zeros((C,), tl.float32)
            overlaps *= between(g_ptr, H_v, prefix, first, last, KIND, C, True, EXACT)[None, :, :]
        overlaps *= _betas(beta_ptr, late, length, H_v)[:, :, None]
        inverse = tl.reshape(_inverse(overlaps, C), (C, C))
        at = tl.arange(0, C)[:, None]
        column = tl.arange(0, C)[None, :]
        tile = tl.where(at > column, inverse, 0.0).to(inverse_ptr.dtype.element_ty)
        tl.store(inverse_ptr + at * C + column, tile)
    else:
        # Of four blocks of 16 tokens: those on the diagonal, the two beside it within halves, and the halves'.
        block = tl.arange(0, BLOCK)[None, :]
        all_four = tl.arange(0, 4)[:, None] * BLOCK + block
        diagonal = _overlaps(k_ptr, norms_ptr, overlaps_ptr, prefix_ptr, all_four, all_four, length, H * K, K, BK, C,
                             KIND, NORMALIZE, PRECISION)  # fmt: skip
        diagonal *= _betas(beta_ptr, all_four, length, H_v)[:, :, None]
        early = tl.arange(0, 2)[:, None] * (2 * BLOCK) + block
        late = early + BLOCK
        pairs = _overlaps(k_ptr, norms_ptr, overlaps_ptr, prefix_ptr, late, early, length, H * K, K, BK, C,
                          KIND, NORMALIZE, PRECISION)  # fmt: skip
        pairs *= _betas(beta_ptr, late, length, H_v)[:, :, None]
        early = tl.arange(0, 2 * BLOCK)[None, :]
        late = early + 2 * BLOCK
        halves = _overlaps(k_ptr, norms_ptr, overlaps_ptr, prefix_ptr, late, early, length, H * K, K, BK, C,
                           KIND, NORMALIZE, PRECISION)  # fmt: skip
        halves *= _betas(beta_ptr, late, length, H_v)[:, :, None]

        inverse = _inverse(diagonal, BLOCK)
        # [4, 16, 16]: the even blocks, and the odd.
        top, bottom = tl.split(tl.permute(tl.reshape(inverse, (2, 2, BLOCK, BLOCK)), (0, 2, 3, 1)))
        beside = -tl.dot(tl.dot(bottom, pairs, input_precision=PRECISION), top, input_precision=PRECISION)
        zeros = tl.zeros((2, BLOCK, BLOCK), tl.float32)
        upper = tl.reshape(tl.permute(tl.join(top, zeros), (0, 1, 3, 2)), (2, BLOCK, 2 * BLOCK))
        lower = tl.reshape(tl.permute(tl.join(beside, bottom), (0, 1, 3, 2)), (2, BLOCK, 2 * BLOCK))
        inverse = tl.reshape(tl.permute(tl.join(upper, lower), (0, 3, 1, 2)), (2, 2 * BLOCK, 2 * BLOCK))
        top, bottom = tl.split(tl.permute(inverse, (1, 2, 0)))
        below = tl.reshape(halves, (2 * BLOCK, 2 * BLOCK))
        below = -tl.dot(tl.dot(bottom, below, input_precision=PRECISION), top, input_precision=PRECISION)

        at = tl.arange(0, 2 * BLOCK)[:, None]
        column = tl.arange(0, 2 * BLOCK)[None, :]
        dtype = inverse_ptr.dtype.element_ty
        tile = inverse_ptr + at * C + column
        tl.store(tile, tl.where(at > column, top, 0.0).to(dtype))
        tl.store(tile + 2 * BLOCK, tl.zeros((2 * BLOCK, 2 * BLOCK), dtype))
        tl.store(tile + 2 * BLOCK * C, below.to(dtype))
        tl.store(tile + 2 * BLOCK * C + 2 * BLOCK, tl.where(at > column, bottom, 0.0).to(dtype))


@triton.jit
def _overlaps(
    k_ptr, norms_ptr, overlaps_ptr, prefix_ptr, late, early, length, row,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """L [N, S, S] of N blocks, whose rows are the tokens `late` [N, S] of the chunk and whose columns are `early`."""
    if KIND == CHANNEL:
        return tl.load(overlaps_ptr + late[:, :, None] * C + early[:, None, :])
    else:
        d = tl.arange(0, BK)[None, None, :]
        k_late = tl.load(k_ptr + late[:, :, None] * row + d, mask=(late[:, :, None] < length) & (d < K), other=0.0)
        k_early = tl.load(k_ptr + early[:, :, None] * row + d, mask=(early[:, :, None] < length) & (d < K), other=0.0)
        overlaps = _product(k_late, k_early, PRECISION)
        if NORMALIZE:
            overlaps *= tl.load(norms_ptr + late)[:, :, None] * tl.load(norms_ptr + early)[:, None, :]
        if KIND == TOKEN:
            log2 = tl.load(prefix_ptr + late)[:, :, None] - tl.load(prefix_ptr + early)[:, None, :]
            # Of later tokens it may be infinite: those are not read.
            overlaps *= tl.exp2(tl.where(log2 > 0, 0.0, log2))
        return overlaps


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """a b^T of [N, S, K]; of a single block as plain matrices."""
    N: tl.constexpr = a.shape[0]
    S: tl.constexpr = a.shape[1]
    K: tl.constexpr = a.shape[2]
    if N == 1:
        product = tl.dot(tl.reshape(a, (S, K)), tl.trans(tl.reshape(b, (S, K))), input_precision=PRECISION)
        return tl.reshape(product, (1, S, S))
    else:
        return tl.dot(a, tl.permute(b, (0, 2, 1)), input_precision=PRECISION)


@triton.jit
def _betas(beta_ptr, tokens, length, H_v):
    """beta of some tokens of a chunk; NaN for what is none (below 0, above 2 or NaN), and so for all that follows."""
    beta = tl.load(beta_ptr + tokens * H_v, mask=tokens < length, other=0.0)
    return tl.where((beta >= 0.0) & (beta <= 2.0), tl.maximum(beta, MIN_BETA), float("nan"))


@triton.jit
def _inverse(overlaps, S: tl.constexpr):
    """(I + the strict lower part of overlaps)^-1, [N, S, S], row after row."""
    i = tl.arange(0, S)
    minus = tl.where((i[:, None] > i[None, :])[None, :, :], -overlaps, 0.0)
    inverse = minus
    at = i[None, :, None]
    for row in range(2, S):
        r = tl.sum(tl.where(at == row, minus, 0.0), 1)
        r += tl.sum(r[:, :, None] * inverse, 1)
        inverse = tl.where(at == row, r[:, None, :], inverse)
    return tl.where((i[:, None] == i[None, :])[None, :, :], 1.0, inverse)
