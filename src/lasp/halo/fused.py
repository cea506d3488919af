"""The short convolution's fused kernels as operators of PyTorch's, which compiled graphs take as they are.

Kept for the backward pass are the inputs alone.
"""

# No postponed annotations: the operators' schemas are read from them.
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("lasp::convolution", mutates_args=())
def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, silu: bool, widths: list[int]
) -> list[Tensor]:
    """y of x [B, T, C], weight [C, W], bias [C], and the rows before x [B, W - 1, C], zero if None; in up to three
    parts [B, T, widths[n]], dense each, as those who read them want them. x may have columns beside those C, which come
    last as they are: the gradient of all is one tensor."""
    from lasp.kernels.triton.neighbours import launches

    return launches.convolve(x, weight, bias, before, silu, widths)


@convolution.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, silu: bool, widths: list[int]
) -> list[Tensor]:
    rest = x.shape[2] - sum(widths)
    return [x.new_empty(*x.shape[:2], width) for width in ([*widths, rest] if rest else widths)]


@torch.library.custom_op("lasp::convolution_gradients", mutates_args=())
def convolution_gradients(
    d_y: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the rows before; of what there is not, something."""
    from lasp.kernels.triton.neighbours import launches

    return launches.convolve_gradients(d_y, x, weight, bias, before, silu)


@convolution_gradients.register_fake
def _(
    d_y: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, width = weight.shape
    rows = x.new_empty(x.shape[0], width - 1, channels)
    return x.new_empty(x.shape), weight.new_empty(channels, width), weight.new_empty(channels), rows


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.silu, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_y: list[Tensor]) -> tuple[Tensor | None, ...]:
    x, weight, bias, before = ctx.saved_tensors
    d_x, d_weight, d_bias, d_before = convolution_gradients(d_y, x, weight, bias, before, ctx.silu)
    return d_x, d_weight, None if bias is None else d_bias, None if before is None else d_before, None, None


convolution.register_autograd(_backward, setup_context=_keep)
