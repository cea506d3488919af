# mypy: ignore-errors
"""Products over V for the gradients of a chunk, whatever the gate.

Where V fits they take tiles that were loaded once, else they load pieces of BV columns.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from lasp.kernels.triton.common.program import DESCRIPTORS, chunk_place, load_chunk


class ChunkPlace(NamedTuple):
    """The place of a program that has some channels of a chunk: their part; the head, batch and chunk; its first token,
    and the one after its last."""

    part: tl.tensor
    head: tl.tensor
    batch: tl.tensor
    chunk: tl.tensor
    first: tl.tensor
    last: tl.tensor


@triton.jit
def gradient_place(places_ptr, parts, B, T, H_v, C: tl.constexpr, PACKED: tl.constexpr):
    """A program's `ChunkPlace`. Heads are the fastest: what programs read at a time is together in memory."""
    programs = parts * B * H_v
    chunk = tl.program_id(0) // programs
    first, last = chunk_place(places_ptr, chunk, T, C, PACKED)
    return ChunkPlace(
        part=tl.program_id(0) % parts,
        head=tl.program_id(0) // parts % H_v,
        batch=tl.cast(tl.program_id(0) % programs // (parts * H_v), tl.int64),
        chunk=chunk,
        first=first,
        last=last,
    )


@triton.jit
def token_tile(source, start, last, row, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr):
    """[C, BV] of do, u or dv, [T, V]; nothing if V does not fit."""
    if V <= BV:
        return load_chunk(source, start, 0, last, row, V, C, BV, DESCRIPTORS)
    else:
        return 0


@triton.jit
def state_tile_of(source, column, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr):
    """[BV, BK] of a chunk's S^T or D^T [.., COLUMNS], which begins at `source`; nothing if V does not fit."""
    if V <= BV:
        return _state_piece(source, 0, column, BV, BK, COLUMNS)
    else:
        return 0


@triton.jit
def _state_piece(source, row, column, BV: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(source + (row + tl.arange(0, BV))[:, None] * COLUMNS + column + tl.arange(0, BK)[None, :])


@triton.jit
def placed_state(first_ptr, rest_ptr, row, BV: tl.constexpr, BK: tl.constexpr, C: tl.constexpr):
    """[BV, BK] of a chunk's S^T or D^T where that lies in the place of its tokens' gradients: row v from `first_ptr` on
    where that of token v will be, and of C rows more from `rest_ptr` on; of each channel where its own gradient will be
    or its neighbour's, so that a program reads nothing that others write."""
    v = tl.arange(0, BV)[:, None]
    return tl.load(tl.where(v < C, first_ptr, rest_ptr) + (v % C) * row + tl.arange(0, BK)[None, :])


@triton.jit
def between_tokens(
    a, b, a_ptr, b_ptr, start, last, row, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):
    """a b^T, [C, C]."""
    if V <= BV:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        product = tl.zeros((C, C), tl.float32)
        for v in range(0, V, BV):
            left = load_chunk(a_ptr, start, v, last, row, V, C, BV, DESCRIPTORS)
            right = load_chunk(b_ptr, start, v, last, row, V, C, BV, DESCRIPTORS)
            product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
        return product


@triton.jit
def from_state(
    a, state, a_ptr, state_ptr, start, last, row, column, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a S^T, [C, BK]."""
    if V <= BV:
        return tl.dot(a, state, input_precision=PRECISION)
    else:
        product = tl.zeros((C, BK), tl.float32)
        for v in range(0, V, BV):
            left = load_chunk(a_ptr, start, v, last, row, V, C, BV, DESCRIPTORS)
            right = _state_piece(state_ptr, v, column, BV, BK, COLUMNS)
            product = tl.dot(left, right, product, input_precision=PRECISION)
        return product


@triton.jit
def from_state_t(
    state, a, state_ptr, a_ptr, start, last, row, column, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S a^T, [BK, C]."""
    if V <= BV:
        return tl.dot(tl.trans(state), tl.trans(a), input_precision=PRECISION)
    else:
        product = tl.zeros((BK, C), tl.float32)
        for v in range(0, V, BV):
            left = _state_piece(state_ptr, v, column, BV, BK, COLUMNS)
            right = load_chunk(a_ptr, start, v, last, row, V, C, BV, DESCRIPTORS)
            product = tl.dot(tl.trans(left), tl.trans(right), product, input_precision=PRECISION)
        return product


@triton.jit
def passing(
    state, d_state, s_ptr, d_ptr, column, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr
):
    """<S, D> channel by channel, [BK]: summed over V."""
    if V <= BV:
        return tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    else:
        met = tl.zeros((BK,), tl.float32)
        for v in range(0, V, BV):
            piece = _state_piece(s_ptr, v, column, BV, BK, COLUMNS).to(tl.float32)
            met += tl.sum(piece * _state_piece(d_ptr, v, column, BV, BK, COLUMNS).to(tl.float32), 0)
        return met


@triton.jit
def store_d_beta(d_beta_ptr, beta_ptr, m, start, last, H_v, C: tl.constexpr):
    """Store d_beta, found from dv u^T: u is beta times what was missing, dv beta times its gradient."""
    t = tl.arange(0, C)
    beta = tl.load(beta_ptr + t)
    d_beta = tl.sum(tl.where(t[:, None] == t[None, :], m, 0.0), 1) / beta / beta
    tl.store(d_beta_ptr + tl.cast(start + t, tl.int64) * H_v, d_beta, mask=start + t < last)
