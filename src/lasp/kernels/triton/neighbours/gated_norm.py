# mypy: ignore-errors
"""RMS norms over groups of channels, with a gate: after the norm, or before it as in Mamba-2, and their gradients.

u = o, n = u / rms(u), y = gain n act(z); or u = o act(z), y = gain n. A row is one group of one token. Nothing is
kept: the gradient's kernel has a whole row at a time and takes its statistics again.
"""

from typing import NamedTuple

import triton
import triton.language as tl

NONE, SILU, SIGMOID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class NormSizes(NamedTuple):
    """Constants that say where rows lie and what of them there is."""

    N: tl.constexpr
    GROUPS: tl.constexpr
    Z_ROW: tl.constexpr
    ACT: tl.constexpr


@triton.jit
def _activation(z, ACT: tl.constexpr):
    """act(z), and its derivative."""
    s = tl.sigmoid(z)
    if ACT == SILU:
        return z * s, s * (1.0 + z * (1.0 - s))
    else:
        return s, s * (1.0 - s)


@triton.jit
def _row_of_group(ptr, rows, mask, columns, ROW: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr):
    """[R, BN]: addresses of rows of a tensor [tokens, GROUPS N] with ROW elements from a token to the next."""
    token, group = rows // GROUPS, rows % GROUPS
    return ptr + token[:, None] * ROW + group[:, None] * N + columns[None, :]


@triton.jit
def _load(ptr, rows, mask, columns, ROW: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr):
    return tl.load(_row_of_group(ptr, rows, mask, columns, ROW, GROUPS, N), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gain(gain_ptr, rows, mask, columns, GROUPS: tl.constexpr, N: tl.constexpr, GAIN: tl.constexpr):
    """Load that of every row: GAIN 1 for one that all groups share, GROUPS for one of each group's own."""
    if GAIN == 1:
        return tl.load(gain_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    else:
        group = rows % GROUPS
        return tl.load(gain_ptr + group[:, None] * N + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["eps", "count"])
def gated_norm_kernel(
    o_ptr,  # [tokens, GROUPS N]
    z_ptr,  # likewise, Z_ROW elements from a token to the next; unless ACT is NONE
    gain_ptr,  # [GAIN N]
    y_ptr,  # [tokens, GROUPS N], written
    eps,
    count,  # rows
    N: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    Z_ROW: tl.constexpr,
    GAIN: tl.constexpr,
    ACT: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    R: tl.constexpr,
):
    """A program for R rows."""
    rows = tl.cast(tl.program_id(0), tl.int64) * R + tl.arange(0, R)
    columns = tl.arange(0, BN)
    mask = (rows < count)[:, None] & (columns < N)[None, :]
    u = _load(o_ptr, rows, mask, columns, GROUPS * N, GROUPS, N)
    gate = 1.0
    if ACT != NONE:
        gate, _ = _activation(_load(z_ptr, rows, mask, columns, Z_ROW, GROUPS, N), ACT)
    if GATE_FIRST:
        u *= gate
    y = u * tl.rsqrt(tl.sum(u * u, 1) / N + eps)[:, None]
    y *= _gain(gain_ptr, rows, mask, columns, GROUPS, N, GAIN)
    if not GATE_FIRST:
        y *= gate
    tl.store(_row_of_group(y_ptr, rows, mask, columns, GROUPS * N, GROUPS, N), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _read(o_ptr, z_ptr, d_y_ptr, rows, mask, columns, sizes: tl.constexpr):
    """Rows of all that the gradients are made of, as they are stored; o for what there is not."""
    place = _row_of_group(o_ptr, rows, mask, columns, sizes.GROUPS * sizes.N, sizes.GROUPS, sizes.N)
    o = tl.load(place, mask=mask, other=0.0)
    place = _row_of_group(d_y_ptr, rows, mask, columns, sizes.GROUPS * sizes.N, sizes.GROUPS, sizes.N)
    d_y = tl.load(place, mask=mask, other=0.0)
    z = o
    if sizes.ACT != NONE:
        z = tl.load(_row_of_group(z_ptr, rows, mask, columns, sizes.Z_ROW, sizes.GROUPS, sizes.N), mask=mask, other=0.0)
    return o, z, d_y


@triton.jit(do_not_specialize=["eps", "count", "steps"])
def gated_norm_gradient_kernel(
    o_ptr,  # as above
    z_ptr,
    gain_ptr,
    d_y_ptr,  # [tokens, GROUPS N]
    d_o_ptr,  # likewise, written; so is that of z
    d_z_ptr,
    y_ptr,  # as gated_norm_kernel writes it, written again if AGAIN
    d_gain_ptr,  # fp32 [programs, GAIN N], written: in parts
    eps,
    count,
    steps,
    N: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    Z_ROW: tl.constexpr,
    GAIN: tl.constexpr,
    ACT: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    AGAIN: tl.constexpr,
    R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program for `steps` times R rows, all of group program_id(1) where groups have gains of their own.

    The next rows come to shared memory while these are worked on, and both of a row's sums are taken at once: programs
    wait for memory and for one another's threads, not for arithmetic.
    """
    sizes: tl.constexpr = NormSizes(N=N, GROUPS=GROUPS, Z_ROW=Z_ROW, ACT=ACT)
    columns = tl.arange(0, BN)
    inside = columns < N
    d_gain = tl.zeros((R, BN), tl.float32)
    groups = GROUPS if GAIN > 1 else 1
    group = tl.program_id(1)
    gain = tl.load(gain_ptr + (group * N if GAIN > 1 else 0) + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = tl.cast(tl.program_id(0), tl.int64) * steps * R + tl.arange(0, R)
    last = tl.minimum(count, (tl.cast(tl.program_id(0), tl.int64) + 1) * steps * R * groups)
    rows = first * groups + group
    mask = (rows < last)[:, None] & inside[None, :]
    for _ in tl.range(steps, num_stages=STAGES):
        here, here_mask = rows, mask
        o, z, d_y = _read(o_ptr, z_ptr, d_y_ptr, here, here_mask, columns, sizes)
        o, d_y = o.to(tl.float32), d_y.to(tl.float32)
        rows += R * groups
        mask = (rows < last)[:, None] & inside[None, :]
        gate, slope = 1.0, 0.0
        if ACT != NONE:
            gate, slope = _activation(z.to(tl.float32), ACT)
        u = o * gate if GATE_FIRST else o
        d_n = d_y * gain
        d_u = d_n if GATE_FIRST else d_n * gate
        squares, products = tl.reduce((u * u, d_u * u), 1, _add_both)
        r = tl.rsqrt(squares / N + eps)
        n = u * r[:, None]
        d_gain += d_y * n if GATE_FIRST else d_y * n * gate
        if AGAIN:
            y = n * gain if GATE_FIRST else n * gain * gate
            places = _row_of_group(y_ptr, here, here_mask, columns, GROUPS * N, GROUPS, N)
            tl.store(places, y.to(y_ptr.dtype.element_ty), mask=here_mask)
        d_o = r[:, None] * (d_u - n * (r * products / N)[:, None])
        d_z = d_o * o * slope if GATE_FIRST else d_n * n * slope
        if GATE_FIRST:
            d_o *= gate
        if ACT != NONE:
            places = _row_of_group(d_z_ptr, here, here_mask, columns, GROUPS * N, GROUPS, N)
            tl.store(places, d_z.to(d_z_ptr.dtype.element_ty), mask=here_mask)
        places = _row_of_group(d_o_ptr, here, here_mask, columns, GROUPS * N, GROUPS, N)
        tl.store(places, d_o.to(d_o_ptr.dtype.element_ty), mask=here_mask)
    program = tl.cast(tl.program_id(0), tl.int64)
    if GAIN == 1:
        program = program * groups + group
        tl.store(d_gain_ptr + program * N + columns, tl.sum(d_gain, 0), mask=inside)
    else:
        tl.store(d_gain_ptr + (program * GROUPS + group) * N + columns, tl.sum(d_gain, 0), mask=inside)
