"""A projection whose output is read in parts, so that its gradient comes in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lasp.recurrence.derivatives import first_derivatives


def project_in_parts(x: Tensor, weight: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """x weight^T in parts [B, T, widths[n]], columns of one product, by x [B, T, D] and weight [sum(widths), D].

    PyTorch would put the parts' gradients into one tensor first, which reads and writes all of them; here each is
    multiplied where it is. Under autocast in its dtype, as a linear layer.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    parts: tuple[Tensor, ...] = _InParts.apply(x, weight, tuple(widths))
    return parts


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.widths = widths
        with torch.autocast(x.device.type, enabled=False):
            return (x @ weight.mT).split(widths, -1)

    @staticmethod
    @first_derivatives("a projection in parts")
    def backward(ctx: Any, *d_parts: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, weights = x.flatten(0, 1), weight.split(ctx.widths)
        d_x: Tensor | None = None
        d_weight = []
        with torch.autocast(x.device.type, enabled=False):
            for d_part, part in zip(d_parts, weights, strict=True):
                d = d_part.flatten(0, 1)
                d_x = d @ part if d_x is None else torch.addmm(d_x, d, part)
                d_weight.append(d.mT @ rows)
        assert d_x is not None
        return d_x.view_as(x), torch.cat(d_weight), None
