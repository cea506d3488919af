# mypy: ignore-errors
"""The short convolution: y_t = activation(bias + sum_j weight[:, W - 1 - j] x_{t - j}), and its gradients.

A program walks S intervals of tokens side by side, each thread some channels of one, and holds the last rows in
registers: every row is read once, but for those around an interval's ends. Nothing is kept for the backward pass, which
walks backwards and computes what went into the activation again. Rows before the first token may be given; without
them they are zero. W is 4 at most; taps that there are not are zero.
"""

import triton
import triton.language as tl


@triton.jit
def _row(x_ptr, before_ptr, t, c, T, C: tl.constexpr, ROW: tl.constexpr, W: tl.constexpr):
    """Row t [S] of one sequence, [S, BC]; those from -(W - 1) to -1 stand in `before`."""
    inside = (c < C)[None, :]
    x = tl.load(x_ptr + (t * ROW)[:, None] + c[None, :], mask=((t >= 0) & (t < T))[:, None] & inside, other=0.0)
    if before_ptr is not None:
        early = ((t < 0) & (t >= 1 - W))[:, None] & inside
        x = tl.where(early, tl.load(before_ptr + ((t + W - 1) * C)[:, None] + c[None, :], mask=early, other=0.0), x)
    return x


@triton.jit
def _tap(weight_ptr, c, back: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    """The weight of the row so many tokens back, [1, BC]."""
    if back < W:
        return tl.load(weight_ptr + c * W + (W - 1 - back), mask=c < C, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.zeros_like(c).to(tl.float32)[None, :]


@triton.jit
def _bias(bias_ptr, c, C: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        return tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.zeros_like(c).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["T", "blocks"])
def convolution_kernel(
    x_ptr,  # [B, T, C], ROW elements from a token to the next
    weight_ptr,  # [C, W]
    bias_ptr,  # [C] if BIAS
    y_ptr,  # [B, T, C], written
    before_ptr,  # [B, W - 1, C], or None
    T,
    blocks,
    C: tl.constexpr,
    ROW: tl.constexpr,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    S: tl.constexpr,
    LENGTH: tl.constexpr,  # of an interval
    BC: tl.constexpr,
):
    """A program for S intervals and BC channels."""
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    # Of long sequences elements are counted in 64 bits.
    t = tl.cast(tl.program_id(0) % blocks * (S * LENGTH), tl.int64) + tl.arange(0, S) * LENGTH
    x_ptr += batch * T * ROW
    y_ptr += batch * T * C
    if before_ptr is not None:
        before_ptr += batch * (W - 1) * C
    a0, a1 = _tap(weight_ptr, c, 0, C, W), _tap(weight_ptr, c, 1, C, W)
    a2, a3 = _tap(weight_ptr, c, 2, C, W), _tap(weight_ptr, c, 3, C, W)
    bias = _bias(bias_ptr, c, C, BIAS)
    x1 = _row(x_ptr, before_ptr, t - 1, c, T, C, ROW, W).to(tl.float32)
    x2 = _row(x_ptr, before_ptr, t - 2, c, T, C, ROW, W).to(tl.float32)
    x3 = _row(x_ptr, before_ptr, t - 3, c, T, C, ROW, W).to(tl.float32)
    coming = _row(x_ptr, None, t, c, T, C, ROW, W)
    for _ in range(LENGTH):
        x0 = coming.to(tl.float32)
        coming = _row(x_ptr, None, t + 1, c, T, C, ROW, W)
        y = bias + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
        if SILU:
            y *= tl.sigmoid(y)
        place = y_ptr + (t * C)[:, None] + c[None, :]
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & (c < C)[None, :])
        x3 = x2
        x2 = x1
        x1 = x0
        t += 1


@triton.jit(do_not_specialize=["T", "blocks"])
def convolution_gradient_kernel(
    x_ptr,  # as above
    weight_ptr,
    bias_ptr,
    d_y_ptr,  # [B, T, C]
    d_x_ptr,  # [B, T, C], written
    sums_ptr,  # fp32 [B blocks, W + 1, C], written: the gradients of weight's columns and of bias, in parts
    d_before_ptr,  # [B, W - 1, C] if there are rows before, written
    before_ptr,  # [B, W - 1, C], or None
    T,
    blocks,
    C: tl.constexpr,
    ROW: tl.constexpr,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    S: tl.constexpr,
    LENGTH: tl.constexpr,
    BC: tl.constexpr,
):
    """A program for S intervals and BC channels; the first begins with the W - 1 tokens before the sequence."""
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (c < C)[None, :]
    first = tl.cast(tl.program_id(0) % blocks * (S * LENGTH), tl.int64) + tl.arange(0, S) * LENGTH - (W - 1)
    x_ptr += batch * T * ROW
    d_y_ptr += batch * T * C
    d_x_ptr += batch * T * C
    if before_ptr is not None:
        before_ptr += batch * (W - 1) * C
        d_before_ptr += batch * (W - 1) * C
    a0, a1 = _tap(weight_ptr, c, 0, C, W), _tap(weight_ptr, c, 1, C, W)
    a2, a3 = _tap(weight_ptr, c, 2, C, W), _tap(weight_ptr, c, 3, C, W)
    bias = _bias(bias_ptr, c, C, BIAS)
    # Gradients of what went into the activation 1, 2 and 3 tokens later. They begin as three values: Triton takes a
    # variable that begins as another one and becomes it in the loop for one that does not change there.
    d1 = tl.zeros((S, BC), tl.float32)
    d2 = tl.zeros((S, BC), tl.float32)
    d3 = tl.zeros((S, BC), tl.float32)
    # Sums of those of taps and bias.
    zero = tl.zeros((S, BC), tl.float32)
    sum0, sum1, sum2, sum3, sum_bias = zero, zero, zero, zero, zero
    # The last tokens of all that the interval's own depend on.
    t = first + LENGTH - 1 + (W - 1)
    x0 = _row(x_ptr, before_ptr, t, c, T, C, ROW, W).to(tl.float32)
    x1 = _row(x_ptr, before_ptr, t - 1, c, T, C, ROW, W).to(tl.float32)
    x2 = _row(x_ptr, before_ptr, t - 2, c, T, C, ROW, W).to(tl.float32)
    x3_coming = _row(x_ptr, before_ptr, t - 3, c, T, C, ROW, W)
    d_coming = _row(d_y_ptr, None, t, c, T, C, C, W)
    for n in range(LENGTH + W - 1):
        x3, d0 = x3_coming.to(tl.float32), d_coming.to(tl.float32)
        x3_coming = _row(x_ptr, before_ptr, t - 4, c, T, C, ROW, W)
        d_coming = _row(d_y_ptr, None, t - 1, c, T, C, C, W)
        if SILU:
            total = bias + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
            s = tl.sigmoid(total)
            d0 *= s * (1.0 + total * (1.0 - s))
        d_x = a0 * d0 + a1 * d1 + a2 * d2 + a3 * d3
        # Those after the interval are another's.
        own = tl.where(n >= W - 1, d0, 0.0)
        sum_bias += own
        sum0 += own * x0
        sum1 += own * x1
        sum2 += own * x2
        sum3 += own * x3
        here = (t < T) & (n >= W - 1)
        place = d_x_ptr + (t * C)[:, None] + c[None, :]
        tl.store(place, d_x.to(d_x_ptr.dtype.element_ty), mask=((t >= 0) & here)[:, None] & inside)
        if before_ptr is not None:
            place = d_before_ptr + ((t + W - 1) * C)[:, None] + c[None, :]
            tl.store(place, d_x.to(d_before_ptr.dtype.element_ty), mask=((t < 0) & here)[:, None] & inside)
        d3 = d2
        d2 = d1
        d1 = d0
        x0 = x1
        x1 = x2
        x2 = x3
        t -= 1
    sums_ptr += tl.cast(tl.program_id(0), tl.int64) * (W + 1) * C + c
    tl.store(sums_ptr + (W - 1) * C, tl.sum(sum0, 0), mask=c < C)
    if W > 1:
        tl.store(sums_ptr + (W - 2) * C, tl.sum(sum1, 0), mask=c < C)
    if W > 2:
        tl.store(sums_ptr + (W - 3) * C, tl.sum(sum2, 0), mask=c < C)
    if W > 3:
        tl.store(sums_ptr, tl.sum(sum3, 0), mask=c < C)
    tl.store(sums_ptr + W * C, tl.sum(sum_bias, 0), mask=c < C)
