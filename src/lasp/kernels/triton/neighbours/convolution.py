# mypy: ignore-errors
"""The short convolution: y_t = activation(bias + sum_j weight[:, W - 1 - j] x_{t - j}), and its gradients.

A program walks S intervals of tokens side by side, each thread some channels of one, and holds the last rows in
registers: every row is read once, but for those around an interval's ends. The next rows come to shared memory while it
works on four. Nothing is kept for the backward pass, which walks backwards and computes what went into the activation
again. Rows before the first token may be given; without them they are zero. W is 4 at most; taps that there are not are
zero. y comes in parts, dense each, for those who read them.

Where documents are packed, begin_ptr says where each token's begins. What lies before is not read by the token, nor
gets a gradient from it: selected, not multiplied by zero, since another document may hold NaN.
"""

import triton
import triton.language as tl


@triton.jit
def _part_of(block, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, BC: tl.constexpr):
    """The place of a block of channels in three parts, in whole blocks each: the part, its width, the block's first
    channel there and among all."""
    first: tl.constexpr = (C0 + BC - 1) // BC
    second: tl.constexpr = first + (C1 + BC - 1) // BC
    part = tl.where(block >= second, 2, tl.where(block >= first, 1, 0))
    width = tl.where(part == 2, C2, tl.where(part == 1, C1, C0))
    here = (block - tl.where(part == 2, second, tl.where(part == 1, first, 0))) * BC
    return part, width, here, here + tl.where(part == 2, C0 + C1, tl.where(part == 1, C0, 0))


@triton.jit
def _of_part(part, first_ptr, second_ptr, third_ptr):
    ptr = first_ptr
    if part == 1:
        ptr = second_ptr
    elif part == 2:
        ptr = third_ptr
    return ptr


@triton.jit
def _row(x_ptr, before_ptr, t, c, inside, T, row, C: tl.constexpr, W: tl.constexpr):
    """Row t [S] of one sequence, [S, BC]; those from -(W - 1) to -1 stand in `before`."""
    x = tl.load(x_ptr + (t * row)[:, None] + c[None, :], mask=((t >= 0) & (t < T))[:, None] & inside, other=0.0)
    if before_ptr is not None:
        early = ((t < 0) & (t >= 1 - W))[:, None] & inside
        x = tl.where(early, tl.load(before_ptr + ((t + W - 1) * C)[:, None] + c[None, :], mask=early, other=0.0), x)
    return x


@triton.jit
def _tap(weight_ptr, c, inside, back: tl.constexpr, W: tl.constexpr):
    """The weight of the row so many tokens back, [1, BC]."""
    if back < W:
        return tl.load(weight_ptr + c[None, :] * W + (W - 1 - back), mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(inside).to(tl.float32)


@triton.jit
def _bias(bias_ptr, c, inside, BIAS: tl.constexpr):
    if BIAS:
        return tl.load(bias_ptr + c[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(inside).to(tl.float32)


@triton.jit
def _rows(x_ptr, before_ptr, t, step: tl.constexpr, c, inside, T, row, C: tl.constexpr, W: tl.constexpr):
    """Rows t, t + step, t + 2 step and t + 3 step, as they are stored."""
    return (
        _row(x_ptr, before_ptr, t, c, inside, T, row, C, W),
        _row(x_ptr, before_ptr, t + step, c, inside, T, row, C, W),
        _row(x_ptr, before_ptr, t + 2 * step, c, inside, T, row, C, W),
        _row(x_ptr, before_ptr, t + 3 * step, c, inside, T, row, C, W),
    )


@triton.jit
def _reach(begin_ptr, t, T, PACKED: tl.constexpr):
    """The number of tokens before each of t [S] that are of its document; below zero where there is no token."""
    if PACKED:
        return (t - tl.load(begin_ptr + t, mask=(t >= 0) & (t < T), other=2147483647))[:, None]
    else:
        return t[:, None]


@triton.jit
def _if(x, reach, back: tl.constexpr, PACKED: tl.constexpr):
    """x, which a token reads of the row so many back, or gives it, if that is of its document."""
    if PACKED:
        x = tl.where(reach >= back, x, 0.0)
    return x


@triton.jit
def _total(bias, a0, a1, a2, a3, x0, x1, x2, x3, reach, PACKED: tl.constexpr):
    """The sum that goes into the activation, of a token's row and the three before it."""
    x1, x2, x3 = _if(x1, reach, 1, PACKED), _if(x2, reach, 2, PACKED), _if(x3, reach, 3, PACKED)
    return bias + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3


@triton.jit
def _given(a0, a1, a2, a3, d0, d1, d2, d3, n1, n2, n3, PACKED: tl.constexpr):
    """A row's gradient, of those that went into the activation of its token and the three after it."""
    d1, d2, d3 = _if(d1, n1, 1, PACKED), _if(d2, n2, 2, PACKED), _if(d3, n3, 3, PACKED)
    return a0 * d0 + a1 * d1 + a2 * d2 + a3 * d3


@triton.jit
def _products(d0, d1, d2, d3, x0, x1, x2, x3, n0, n1, n2, n3, back: tl.constexpr, PACKED: tl.constexpr):
    """The sum over four tokens of their gradients times the rows so many back."""
    x0, x1, x2, x3 = (
        _if(x0, n0, back, PACKED),
        _if(x1, n1, back, PACKED),
        _if(x2, n2, back, PACKED),
        _if(x3, n3, back, PACKED),
    )
    return d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3


@triton.jit
def _output(y_ptr, t, y, c, inside, T, row, SILU: tl.constexpr):
    if SILU:
        y *= tl.sigmoid(y)
    place = y_ptr + (t * row)[:, None] + c[None, :]
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & inside)


@triton.jit
def _activated_gradient(d_y, total, SILU: tl.constexpr):
    """The gradient of `total`, which went into the activation."""
    d = d_y.to(tl.float32)
    if SILU:
        s = tl.sigmoid(total)
        d *= s * (1.0 + total * (1.0 - s))
    return d


@triton.jit
def _store_gradient(d_x_ptr, d_before_ptr, t, d_x, c, inside, T, D_ROW: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    place = d_x_ptr + (t * D_ROW)[:, None] + c[None, :]
    tl.store(place, d_x.to(d_x_ptr.dtype.element_ty), mask=((t >= 0) & (t < T))[:, None] & inside)
    if d_before_ptr is not None:
        place = d_before_ptr + ((t + W - 1) * C)[:, None] + c[None, :]
        tl.store(place, d_x.to(d_before_ptr.dtype.element_ty), mask=((t < 0) & (t < T))[:, None] & inside)


@triton.jit(do_not_specialize=["T", "blocks"])
def convolution_kernel(
    x_ptr,  # [B, T, C], ROW elements from a token to the next
    weight_ptr,  # [C, W]
    bias_ptr,  # [C] if BIAS
    first_ptr,  # [B, T, C0], written; so are the others: y in up to three parts
    second_ptr,  # [B, T, C1], if C1 > 0
    third_ptr,  # [B, T, C2], if C2 > 0
    begin_ptr,  # int32 [T] if PACKED: where each token's document begins, below 0 before the first token
    before_ptr,  # [B, W - 1, C], or None
    T,
    blocks,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    ROW: tl.constexpr,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    S: tl.constexpr,
    LENGTH: tl.constexpr,  # of an interval, a multiple of four
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program for S intervals and BC channels."""
    C: tl.constexpr = C0 + C1 + C2
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    part, width, here, c = _part_of(tl.program_id(1), C0, C1, C2, BC)
    here += tl.arange(0, BC)
    c += tl.arange(0, BC)
    inside = (here < width)[None, :]
    # Of long sequences elements are counted in 64 bits.
    t = tl.cast(tl.program_id(0) % blocks * (S * LENGTH), tl.int64) + tl.arange(0, S) * LENGTH
    x_ptr += batch * T * ROW
    y_ptr = _of_part(part, first_ptr, second_ptr, third_ptr) + batch * T * width
    if before_ptr is not None:
        before_ptr += batch * (W - 1) * C
    a0, a1 = _tap(weight_ptr, c, inside, 0, W), _tap(weight_ptr, c, inside, 1, W)
    a2, a3 = _tap(weight_ptr, c, inside, 2, W), _tap(weight_ptr, c, inside, 3, W)
    bias = _bias(bias_ptr, c, inside, BIAS)
    x1 = _row(x_ptr, before_ptr, t - 1, c, inside, T, ROW, C, W).to(tl.float32)
    x2 = _row(x_ptr, before_ptr, t - 2, c, inside, T, ROW, C, W).to(tl.float32)
    x3 = _row(x_ptr, before_ptr, t - 3, c, inside, T, ROW, C, W).to(tl.float32)
    for _ in tl.range(0, LENGTH, 4, num_stages=STAGES):
        r0, r1, r2, r3 = _rows(x_ptr, None, t, 1, c, inside, T, ROW, C, W)
        x0, x_1, x_2, x_3 = r0.to(tl.float32), r1.to(tl.float32), r2.to(tl.float32), r3.to(tl.float32)
        n0, n1 = _reach(begin_ptr, t, T, PACKED), _reach(begin_ptr, t + 1, T, PACKED)
        n2, n3 = _reach(begin_ptr, t + 2, T, PACKED), _reach(begin_ptr, t + 3, T, PACKED)
        y = _total(bias, a0, a1, a2, a3, x0, x1, x2, x3, n0, PACKED)
        _output(y_ptr, t, y, here, inside, T, width, SILU)
        y = _total(bias, a0, a1, a2, a3, x_1, x0, x1, x2, n1, PACKED)
        _output(y_ptr, t + 1, y, here, inside, T, width, SILU)
        y = _total(bias, a0, a1, a2, a3, x_2, x_1, x0, x1, n2, PACKED)
        _output(y_ptr, t + 2, y, here, inside, T, width, SILU)
        y = _total(bias, a0, a1, a2, a3, x_3, x_2, x_1, x0, n3, PACKED)
        _output(y_ptr, t + 3, y, here, inside, T, width, SILU)
        x1, x2, x3 = x_3, x_2, x_1
        t += 4


@triton.jit(do_not_specialize=["T", "blocks"])
def convolution_gradient_kernel(
    x_ptr,  # as above
    weight_ptr,
    bias_ptr,
    first_ptr,  # [B, T, C0]; so are the others: the gradient of y in parts
    second_ptr,  # [B, T, C1], if C1 > 0
    third_ptr,  # [B, T, C2], if C2 > 0
    d_x_ptr,  # [B, T, C], D_ROW elements from a token to the next, written
    sums_ptr,  # fp32 [B blocks, W + 1, C], written: the gradients of weight's columns and of bias, in parts
    d_before_ptr,  # [B, W - 1, C] if there are rows before, written
    begin_ptr,  # int32 [T] if PACKED
    before_ptr,  # [B, W - 1, C], or None
    T,
    blocks,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    ROW: tl.constexpr,
    D_ROW: tl.constexpr,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    S: tl.constexpr,
    LENGTH: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program for S intervals and BC channels; the first begins with the W - 1 tokens before the sequence."""
    C: tl.constexpr = C0 + C1 + C2
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    part, width, here, c = _part_of(tl.program_id(1), C0, C1, C2, BC)
    here += tl.arange(0, BC)
    c += tl.arange(0, BC)
    inside = (here < width)[None, :]
    first = tl.cast(tl.program_id(0) % blocks * (S * LENGTH), tl.int64) + tl.arange(0, S) * LENGTH - (W - 1)
    x_ptr += batch * T * ROW
    d_y_ptr = _of_part(part, first_ptr, second_ptr, third_ptr) + batch * T * width
    d_x_ptr += batch * T * D_ROW
    if before_ptr is not None:
        before_ptr += batch * (W - 1) * C
        d_before_ptr += batch * (W - 1) * C
    else:
        d_before_ptr = None
    a0, a1 = _tap(weight_ptr, c, inside, 0, W), _tap(weight_ptr, c, inside, 1, W)
    a2, a3 = _tap(weight_ptr, c, inside, 2, W), _tap(weight_ptr, c, inside, 3, W)
    bias = _bias(bias_ptr, c, inside, BIAS)
    zero = tl.zeros((S, BC), tl.float32)
    sum0, sum1, sum2, sum3, sum_bias = zero, zero, zero, zero, zero
    # Gradients of what went into the activation 1, 2 and 3 tokens later: of the interval's last token first. Sums of
    # those are another interval's.
    t = first + LENGTH - 1
    r0, r1, r2, r3 = _rows(x_ptr, before_ptr, t + 3, -1, c, inside, T, ROW, C, W)
    x0, x1, x2, x3 = r0.to(tl.float32), r1.to(tl.float32), r2.to(tl.float32), r3.to(tl.float32)
    x_1 = _row(x_ptr, before_ptr, t - 1, c, inside, T, ROW, C, W).to(tl.float32)
    x_2 = _row(x_ptr, before_ptr, t - 2, c, inside, T, ROW, C, W).to(tl.float32)
    e0, e1, e2, _ = _rows(d_y_ptr, None, t + 3, -1, here, inside, T, width, C, W)
    n3, n2 = _reach(begin_ptr, t + 3, T, PACKED), _reach(begin_ptr, t + 2, T, PACKED)
    n1 = _reach(begin_ptr, t + 1, T, PACKED)
    d3 = _activated_gradient(e0, _total(bias, a0, a1, a2, a3, x0, x1, x2, x3, n3, PACKED), SILU)
    d2 = _activated_gradient(e1, _total(bias, a0, a1, a2, a3, x1, x2, x3, x_1, n2, PACKED), SILU)
    d1 = _activated_gradient(e2, _total(bias, a0, a1, a2, a3, x2, x3, x_1, x_2, n1, PACKED), SILU)
    x0, x1, x2 = x3, x_1, x_2
    for _ in tl.range(0, LENGTH, 4, num_stages=STAGES):
        r0, r1, r2, r3 = _rows(x_ptr, before_ptr, t - 3, -1, c, inside, T, ROW, C, W)
        f0, f1, f2, f3 = _rows(d_y_ptr, None, t, -1, here, inside, T, width, C, W)
        x3, x4, x5, x6 = r0.to(tl.float32), r1.to(tl.float32), r2.to(tl.float32), r3.to(tl.float32)
        n1, n2 = _reach(begin_ptr, t + 1, T, PACKED), _reach(begin_ptr, t + 2, T, PACKED)
        n3, n0 = _reach(begin_ptr, t + 3, T, PACKED), _reach(begin_ptr, t, T, PACKED)
        n_1, n_2 = _reach(begin_ptr, t - 1, T, PACKED), _reach(begin_ptr, t - 2, T, PACKED)
        n_3 = _reach(begin_ptr, t - 3, T, PACKED)
        d0 = _activated_gradient(f0, _total(bias, a0, a1, a2, a3, x0, x1, x2, x3, n0, PACKED), SILU)
        d_x = _given(a0, a1, a2, a3, d0, d1, d2, d3, n1, n2, n3, PACKED)
        _store_gradient(d_x_ptr, d_before_ptr, t, d_x, c, inside, T, D_ROW, C, W)
        d_1 = _activated_gradient(f1, _total(bias, a0, a1, a2, a3, x1, x2, x3, x4, n_1, PACKED), SILU)
        d_x = _given(a0, a1, a2, a3, d_1, d0, d1, d2, n0, n1, n2, PACKED)
        _store_gradient(d_x_ptr, d_before_ptr, t - 1, d_x, c, inside, T, D_ROW, C, W)
        d_2 = _activated_gradient(f2, _total(bias, a0, a1, a2, a3, x2, x3, x4, x5, n_2, PACKED), SILU)
        d_x = _given(a0, a1, a2, a3, d_2, d_1, d0, d1, n_1, n0, n1, PACKED)
        _store_gradient(d_x_ptr, d_before_ptr, t - 2, d_x, c, inside, T, D_ROW, C, W)
        d_3 = _activated_gradient(f3, _total(bias, a0, a1, a2, a3, x3, x4, x5, x6, n_3, PACKED), SILU)
        d_x = _given(a0, a1, a2, a3, d_3, d_2, d_1, d0, n_2, n_1, n0, PACKED)
        _store_gradient(d_x_ptr, d_before_ptr, t - 3, d_x, c, inside, T, D_ROW, C, W)
        sum_bias += d0 + d_1 + d_2 + d_3
        sum0 += d0 * x0 + d_1 * x1 + d_2 * x2 + d_3 * x3
        sum1 += _products(d0, d_1, d_2, d_3, x1, x2, x3, x4, n0, n_1, n_2, n_3, 1, PACKED)
        sum2 += _products(d0, d_1, d_2, d_3, x2, x3, x4, x5, n0, n_1, n_2, n_3, 2, PACKED)
        sum3 += _products(d0, d_1, d_2, d_3, x3, x4, x5, x6, n0, n_1, n_2, n_3, 3, PACKED)
        d1, d2, d3 = d_3, d_2, d_1
        x0, x1, x2 = x4, x5, x6
        t -= 4
    sums_ptr += tl.cast(tl.program_id(0), tl.int64) * (W + 1) * C + c
    tl.store(sums_ptr + (W - 1) * C, tl.sum(sum0, 0), mask=here < width)
    if W > 1:
        tl.store(sums_ptr + (W - 2) * C, tl.sum(sum1, 0), mask=here < width)
    if W > 2:
        tl.store(sums_ptr + (W - 3) * C, tl.sum(sum2, 0), mask=here < width)
    if W > 3:
        tl.store(sums_ptr, tl.sum(sum3, 0), mask=here < width)
    tl.store(sums_ptr + W * C, tl.sum(sum_bias, 0), mask=here < width)
