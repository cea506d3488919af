"""Several projections as one product, and one whose output, and so its gradient, is read in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lasp.recurrence.derivatives import first_derivatives


def project_together(x: Tensor, *projections: nn.Module) -> Tensor:
    """The outputs of several projections of x, side by side: one product, and one for the gradient of x.

    So under autocast, which makes a copy of the weights anyhow, and where they are plain linear layers; what else
    stands in a place, as an adapter around one, is called, and one that has hooks or a forward of its own.
    """
    if torch.is_autocast_enabled(x.device.type) and all(_is_plain(each) for each in projections):
        return F.linear(x, torch.cat([each.weight for each in projections]))  # type: ignore[misc]
    return torch.cat([each(x) for each in projections], -1)


def project_in_parts(x: Tensor, projection: nn.Module, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """projection(x) in parts [B, T, widths[n]], columns of one product, by x [B, T, D].

    PyTorch would put the parts' gradients into one tensor first, which reads and writes all of them; here each is
    multiplied where it is. So of a plain linear layer, as `project_together`.
    """
    if not _is_plain(projection):
        return projection(x).split(list(widths), -1)  # type: ignore[no-any-return]
    weight: Tensor = projection.weight  # type: ignore[assignment]
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = (each if each.dtype == torch.float64 else each.to(dtype) for each in (x, weight))
    parts: tuple[Tensor, ...] = _InParts.apply(x, weight, tuple(widths))
    return parts


def _is_plain(projection: nn.Module) -> bool:
    return (
        type(projection) is nn.Linear
        and projection.bias is None
        and "forward" not in vars(projection)
        and not _has_any_global_hook()
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
        and not projection._backward_hooks
        and not projection._backward_pre_hooks
    )


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
        of_x, of_weight, _ = ctx.needs_input_grad
        d_x: Tensor | None = None
        d_weight = []
        with torch.autocast(x.device.type, enabled=False):
            for d_part, part in zip(d_parts, weights, strict=True):
                d = d_part.flatten(0, 1)
                if of_x:
                    d_x = d @ part if d_x is None else torch.addmm(d_x, d, part)
                if of_weight:
                    d_weight.append(d.mT @ rows)
        return None if d_x is None else d_x.view_as(x), torch.cat(d_weight) if of_weight else None, None
