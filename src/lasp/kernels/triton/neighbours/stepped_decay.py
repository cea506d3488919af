# mypy: ignore-errors
"""Mamba-2's steps: dt = softplus(raw + bias), log-decay -exp(log_rate) dt, values dt x, and their gradients."""

import triton
import triton.language as tl


@triton.jit
def _step(raw):
    """softplus(raw), and its derivative."""
    return tl.maximum(raw, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(raw))), tl.sigmoid(raw)


@triton.jit(do_not_specialize=["tokens"])
def stepped_decay_kernel(
    raw_ptr,  # [tokens, H], RAW_ROW elements from a token to the next
    x_ptr,  # [tokens, H P], X_ROW elements from a token to the next
    bias_ptr,  # fp32 [H]
    rate_ptr,  # fp32 [H], logarithms
    values_ptr,  # [tokens, H, P], written
    decay_ptr,  # fp32 [tokens, H], written
    tokens,
    H: tl.constexpr,
    P: tl.constexpr,
    BP: tl.constexpr,
    RAW_ROW: tl.constexpr,
    X_ROW: tl.constexpr,
    BT: tl.constexpr,
):
    """A program for so many tokens of one head."""
    rows = tl.cast(tl.program_id(0), tl.int64) * BT + tl.arange(0, BT)
    head, p = tl.program_id(1), tl.arange(0, BP)
    here = rows < tokens
    raw = tl.load(raw_ptr + rows * RAW_ROW + head, mask=here, other=0.0).to(tl.float32) + tl.load(bias_ptr + head)
    dt, _ = _step(raw)
    tl.store(decay_ptr + rows * H + head, -tl.exp(tl.load(rate_ptr + head)) * dt, mask=here)
    mask = here[:, None] & (p < P)[None, :]
    x = tl.load(x_ptr + rows[:, None] * X_ROW + head * P + p[None, :], mask=mask, other=0.0).to(tl.float32)
    values = (dt[:, None] * x).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + (rows * H + head)[:, None] * P + p[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["tokens", "steps"])
def stepped_decay_gradient_kernel(
    raw_ptr,  # as above
    x_ptr,
    bias_ptr,
    rate_ptr,
    d_values_ptr,  # [tokens, H, P]
    d_decay_ptr,  # fp32 [tokens, H]
    d_raw_ptr,  # [tokens, H], written
    d_x_ptr,  # [tokens, H, P], written
    sums_ptr,  # fp32 [programs, 2, H], written: the gradients of bias and log-rate, in parts
    tokens,
    steps,
    H: tl.constexpr,
    P: tl.constexpr,
    BP: tl.constexpr,
    RAW_ROW: tl.constexpr,
    X_ROW: tl.constexpr,
    BT: tl.constexpr,
):
    """A program for `steps` times so many tokens of one head."""
    head, p = tl.program_id(1), tl.arange(0, BP)
    bias, rate = tl.load(bias_ptr + head), tl.exp(tl.load(rate_ptr + head))
    d_bias, d_rate = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    for step in range(steps):
        rows = (tl.cast(tl.program_id(0), tl.int64) * steps + step) * BT + tl.arange(0, BT)
        here = rows < tokens
        mask = here[:, None] & (p < P)[None, :]
        raw = tl.load(raw_ptr + rows * RAW_ROW + head, mask=here, other=0.0).to(tl.float32) + bias
        dt, slope = _step(raw)
        x = tl.load(x_ptr + rows[:, None] * X_ROW + head * P + p[None, :], mask=mask, other=0.0).to(tl.float32)
        places = (rows * H + head)[:, None] * P + p[None, :]
        d_values = tl.load(d_values_ptr + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + places, (dt[:, None] * d_values).to(d_x_ptr.dtype.element_ty), mask=mask)
        d_decay = -rate * tl.load(d_decay_ptr + rows * H + head, mask=here, other=0.0)
        d_raw = (tl.sum(d_values * x, 1) + d_decay) * slope
        tl.store(d_raw_ptr + rows * H + head, d_raw.to(d_raw_ptr.dtype.element_ty), mask=here)
        d_bias += d_raw
        d_rate += d_decay * dt
    sums_ptr += tl.program_id(0) * 2 * H + head
    tl.store(sums_ptr, tl.sum(d_bias, 0))
    tl.store(sums_ptr + H, tl.sum(d_rate, 0))
