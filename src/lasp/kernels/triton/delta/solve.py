# mypy: ignore-errors
"""A - I of every chunk and value head, A = (I + diag(beta) L)^-1; and beta, and sums of gates, laid out as the sweeps
read them.

Blocks on the diagonal are inverted by substitution, all at once; pairs of blocks are merged by products. A series of
the inverse instead (of L, L^2, L^4, ..) would overflow where keys are alike and beta is near 2, and so would an inverse
without the decays in it, where these keep beta k.k > 2 in check.
"""

import triton
import triton.language as tl

from lasp.kernels.triton.common.decays import CHANNEL, TOKEN, log2_gate
from lasp.kernels.triton.common.program import chunk_place
from lasp.kernels.triton.delta.chunk import BLOCK, MIN_BETA, between

LANES = tl.constexpr(32)  # columns that a warp has at a time


@triton.jit(do_not_specialize=["T", "H", "H_v", "chunks"])
def solve_kernel(
    k_ptr,  # [B, T, H, K]; unused if CHANNEL
    r_ptr,  # likewise, if ERASES: what tokens read with
    norms_ptr,  # fp32 [B, H, chunks C] if NORMALIZE
    overlaps_ptr,  # fp32 [B, H_v, chunks, C, C] if CHANNEL: L
    beta_ptr,  # fp32 [B, T, H_v]
    g_ptr,  # fp32 [B, T, H_v] if TOKEN
    prefix_ptr,  # fp32 [B, H_v, chunks C] if TOKEN: written, also past a chunk's end; read if EXACT
    inverse_ptr,  # [B, H_v, chunks, C, C], written
    betas_ptr,  # fp32 [B, H_v, chunks C], written
    bounds_ptr,  # fp32 [B, H_v, chunks], written if TOKEN and not ERASES: log2 of what passes a chunk at most
    places_ptr,  # int32 [chunks, 4] if PACKED
    T,
    H,
    H_v,
    chunks,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    ERASES: tl.constexpr,
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
    keys = (batch * T * H + tl.cast(first, tl.int64) * H + key_head) * K
    norms_ptr += ((batch * H + key_head) * chunks + chunk) * C
    overlaps_ptr += slot * C
    beta_ptr += (batch * T + first) * H_v + head
    g_ptr += batch * T * H_v + head
    prefix_ptr += slot
    inverse_ptr += slot * C

    i = tl.arange(0, C)
    betas = _betas(beta_ptr, i, last - first, H_v)
    tl.store(betas_ptr + slot + i, betas)

    prefix, total = betas, 0.0
    if KIND == TOKEN and EXACT:
        prefix, total = tl.load(prefix_ptr + i), tl.load(prefix_ptr + C - 1)
    elif KIND == TOKEN:
        gates = log2_gate(g_ptr + (tl.cast(first, tl.int64) + i) * H_v, first + i < last)
        prefix, total = tl.cumsum(gates, 0), tl.sum(gates, 0)
        tl.store(prefix_ptr + i, prefix)
    if KIND == CHANNEL and C == 4 * BLOCK:
        diagonal, pairs, halves = _loaded_blocks(overlaps_ptr, beta_ptr, last - first, H_v, C)
    else:
        overlaps = _overlaps(
            k_ptr + keys, r_ptr + keys, norms_ptr, overlaps_ptr, g_ptr, prefix, first, last, H, H_v, K, BK, C,
            KIND, ERASES, EXACT, NORMALIZE, PRECISION,
        ) * betas[:, None]  # fmt: skip
    if C < 4 * BLOCK:
        diagonal = tl.reshape(overlaps, (1, C, C))
        inverse = tl.reshape(_inverse(diagonal), (C, C))
        column = i[None, :]
        tile = tl.where(i[:, None] > column, inverse, 0.0).to(inverse_ptr.dtype.element_ty)
        tl.store(inverse_ptr + i[:, None] * C + column, tile)
    else:
        if KIND != CHANNEL:
            diagonal, pairs, halves = _blocks(overlaps)
        inverse = _inverse(diagonal)
        # [4, 16, 16]: the even blocks, and the odd.
        top, bottom = tl.split(tl.permute(tl.reshape(inverse, (2, 2, BLOCK, BLOCK)), (0, 2, 3, 1)))
        beside = -tl.dot(tl.dot(bottom, pairs, input_precision=PRECISION), top, input_precision=PRECISION)
        zeros = tl.zeros((2, BLOCK, BLOCK), tl.float32)
        upper = tl.reshape(tl.permute(tl.join(top, zeros), (0, 1, 3, 2)), (2, BLOCK, 2 * BLOCK))
        lower = tl.reshape(tl.permute(tl.join(beside, bottom), (0, 1, 3, 2)), (2, BLOCK, 2 * BLOCK))
        inverse = tl.reshape(tl.permute(tl.join(upper, lower), (0, 3, 1, 2)), (2, 2 * BLOCK, 2 * BLOCK))
        top, bottom = tl.split(tl.permute(inverse, (1, 2, 0)))
        below = -tl.dot(tl.dot(bottom, halves, input_precision=PRECISION), top, input_precision=PRECISION)

        at = tl.arange(0, 2 * BLOCK)[:, None]
        column = tl.arange(0, 2 * BLOCK)[None, :]
        dtype = inverse_ptr.dtype.element_ty
        tile = inverse_ptr + at * C + column
        tl.store(tile, tl.where(at > column, top, 0.0).to(dtype))
        tl.store(tile + 2 * BLOCK, tl.zeros((2 * BLOCK, 2 * BLOCK), dtype))
        tl.store(tile + 2 * BLOCK * C, below.to(dtype))
        tl.store(tile + 2 * BLOCK * C + 2 * BLOCK, tl.where(at > column, bottom, 0.0).to(dtype))
    if KIND == TOKEN and not ERASES:
        tl.store(bounds_ptr + run * chunks + chunk, total + _growth(diagonal))


@triton.jit
def _growth(diagonal):
    """Return log2 of how much a chunk's tokens may lengthen a state: of each the norm of I - beta k k^T, at least one.

    diagonal: [N, S, S], its diagonals beta k.k, which are as exact as products of rounded keys.
    """
    S: tl.constexpr = diagonal.shape[1]
    i = tl.arange(0, S)
    erased = tl.sum(tl.where((i[:, None] == i[None, :])[None, :, :], diagonal, 0.0), 2) * (1.0 + 2.0**-6)
    # Not by a maximum, which would lose NaN.
    return tl.sum(tl.sum(tl.log2(tl.where(erased <= 2.0, 2.0, erased) - 1.0), 1), 0)


@triton.jit
def _blocks(overlaps):
    """Cut into blocks of 16 tokens: the four on the diagonal [4, 16, 16], two beside it within halves [2, 16, 16],
    and what lies between the halves [32, 32]."""
    blocks = tl.reshape(overlaps, (4, BLOCK, 4, BLOCK))
    row = tl.arange(0, 4)[:, None, None, None]
    column = tl.arange(0, 4)[None, None, :, None]
    diagonal = tl.sum(tl.where(row == column, blocks, 0.0), 2)
    pairs = tl.sum(tl.where((row == column + 1) & (row % 2 == 1), blocks, 0.0), 2)
    pairs = tl.sum(tl.reshape(pairs, (2, 2, BLOCK, BLOCK)), 1)
    row = tl.arange(0, 2)[:, None, None, None]
    column = tl.arange(0, 2)[None, None, :, None]
    halves = tl.where(row > column, tl.reshape(overlaps, (2, 2 * BLOCK, 2, 2 * BLOCK)), 0.0)
    return diagonal, pairs, tl.sum(tl.sum(halves, 2), 0)


@triton.jit
def _loaded_blocks(overlaps_ptr, beta_ptr, length, H_v, C: tl.constexpr):
    """Load `_blocks` of beta L, each by itself: a tile of all would fill the registers of its warp."""
    block = tl.arange(0, BLOCK)[None, :]
    late = tl.arange(0, 4)[:, None] * BLOCK + block
    diagonal = tl.load(overlaps_ptr + late[:, :, None] * C + late[:, None, :])
    diagonal *= _betas(beta_ptr, late, length, H_v)[:, :, None]
    early = tl.arange(0, 2)[:, None] * (2 * BLOCK) + block
    late = early + BLOCK
    pairs = tl.load(overlaps_ptr + late[:, :, None] * C + early[:, None, :])
    pairs *= _betas(beta_ptr, late, length, H_v)[:, :, None]
    early = tl.arange(0, 2 * BLOCK)
    late = early + 2 * BLOCK
    halves = tl.load(overlaps_ptr + late[:, None] * C + early[None, :])
    return diagonal, pairs, halves * _betas(beta_ptr, late, length, H_v)[:, None]


@triton.jit
def _overlaps(
    k_ptr, r_ptr, norms_ptr, overlaps_ptr, g_ptr, prefix, first, last, H, H_v, K: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, KIND: tl.constexpr, ERASES: tl.constexpr, EXACT: tl.constexpr, NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """L [C, C]; above the diagonal anything."""
    i = tl.arange(0, C)
    if KIND == CHANNEL:
        return tl.load(overlaps_ptr + i[:, None] * C + i[None, :])
    else:
        d = tl.arange(0, BK)[None, :]
        tile = i[:, None] * (H * K) + d
        inside = (first + i[:, None] < last) & (d < K)
        k = tl.load(k_ptr + tile, mask=inside, other=0.0)
        r = tl.load(r_ptr + tile, mask=inside, other=0.0) if ERASES else k
        overlaps = tl.dot(r, tl.trans(k), input_precision=PRECISION)
        if NORMALIZE:
            norms = tl.load(norms_ptr + i)
            overlaps *= norms[:, None] * norms[None, :]
        if KIND == TOKEN:
            overlaps *= between(g_ptr, H_v, prefix, first, last, KIND, C, True, EXACT)
        return overlaps


@triton.jit
def _betas(beta_ptr, tokens, length, H_v):
    """beta of some tokens of a chunk; NaN for what is none (below 0, above 2 or NaN), and so for all that follows."""
    beta = tl.load(beta_ptr + tokens * H_v, mask=tokens < length, other=0.0)
    return tl.where((beta >= 0.0) & (beta <= 2.0), tl.maximum(beta, MIN_BETA), float("nan"))


@triton.jit
def _inverse(overlaps):
    """(I + the strict lower part of overlaps)^-1, [N, S, S], row after row.

    In an order of dims that leaves the rows of a column to one thread: nothing is summed between threads, which only
    hand around the factors of a row.
    """
    N: tl.constexpr = overlaps.shape[0]
    S: tl.constexpr = overlaps.shape[1]
    i = tl.arange(0, S)
    lower = tl.where((i[:, None] > i[None, :])[None, :, :], overlaps, 0.0)
    lower = tl.reshape(tl.permute(lower, (2, 0, 1)), (S, N * S // LANES, LANES))
    column = tl.arange(0, LANES)[None, None, :]
    block = tl.broadcast_to(column // S * S, (S // 2, N * S // LANES, LANES))
    row = tl.arange(0, S // 2)[:, None, None]
    # Rows of the first half know nothing of those of the second.
    lower, later = _halves(lower)
    inverse = tl.broadcast_to(tl.where(row == column % S, 1.0, 0.0), (S // 2, N * S // LANES, LANES))
    for late in range(1, S // 2):
        known = tl.sum(tl.gather(lower, block + late, 2) * inverse, 0)
        inverse -= tl.where(row == late, known[None, :, :], 0.0)
    rest = tl.broadcast_to(tl.where(row + S // 2 == column % S, 1.0, 0.0), (S // 2, N * S // LANES, LANES))
    for late in range(S // 2, S):
        known = tl.sum(tl.gather(lower, block + late, 2) * inverse, 0)
        known += tl.sum(tl.gather(later, block + late, 2) * rest, 0)
        rest -= tl.where(row + S // 2 == late, known[None, :, :], 0.0)
    inverse = tl.permute(tl.join(inverse, rest), (3, 0, 1, 2))
    return tl.permute(tl.reshape(inverse, (S, N, S)), (1, 0, 2))


@triton.jit
def _halves(x):
    """Cut the first dim into halves."""
    S: tl.constexpr = x.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(x, (2, S, x.shape[1], x.shape[2])), (1, 2, 3, 0)))
