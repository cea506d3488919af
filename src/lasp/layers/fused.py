"""Gated norms: fused kernels where they run, else PyTorch's, which define them.

The kernels are operators, which compiled graphs take as they are. Kept for the backward pass are the inputs alone.
"""

# No postponed annotations: the operators' schemas are read from them.
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.select import has_fused_kernels
from lasp.layers.recomputed import recomputed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


@torch.library.custom_op("lasp::gated_norm", mutates_args=())
def _gated_norm(
    o: Tensor,
    gate: Tensor | None,
    gain: Tensor,
    groups: int,
    activation: str,
    gate_first: bool,
    eps: float,
) -> Tensor:
    from lasp.kernels.triton.neighbours import launches

    return launches.gated_norm(o, gate, gain, groups, activation, gate_first, eps)


@_gated_norm.register_fake
def _(
    o: Tensor,
    gate: Tensor | None,
    gain: Tensor,
    groups: int,
    activation: str,
    gate_first: bool,
    eps: float,
) -> Tensor:
    return o.new_empty(*o.shape[:2], o.shape[2:].numel())


@torch.library.custom_op("lasp::gated_norm_gradients", mutates_args=())
def _gated_norm_gradients(
    d_y: Tensor,
    o: Tensor,
    gate: Tensor | None,
    gain: Tensor,
    groups: int,
    activation: str,
    gate_first: bool,
    eps: float,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lasp.kernels.triton.neighbours import launches

    return launches.gated_norm_gradients(d_y, o, gate, gain, groups, activation, gate_first, eps, again)


@_gated_norm_gradients.register_fake
def _(
    d_y: Tensor,
    o: Tensor,
    gate: Tensor | None,
    gain: Tensor,
    groups: int,
    activation: str,
    gate_first: bool,
    eps: float,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return o.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return like(o), like(gate), like(gain), like(d_y if again else None)


def _keep_gated_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.ways = inputs[3:]


def _gated_norm_backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors
    gradients = _gated_norm_gradients(d_y, *given, *ctx.ways, False)[:3]
    found = (None if tensor is None else d for tensor, d in zip(given, gradients, strict=True))
    return *found, None, None, None, None


_gated_norm.register_autograd(_gated_norm_backward, setup_context=_keep_gated_norm)


@torch.library.custom_op("lasp::normed_projection", mutates_args=())
def _normed_projection(
    o: Tensor,
    gate: Tensor | None,
    gain: Tensor,
    weight: Tensor,
    groups: int,
    activation: str,
    gate_first: bool,
    eps: float,
) -> Tensor:
    """gated_norm(..) weight^T. The norm's output is not kept: the kernel of its gradients makes it again, for weight's.

    weight: [N, D], of o's dtype.
    """
    return _gated_norm(o, gate, gain, groups, activation, gate_first, eps) @ weight.mT  # type: ignore[no-any-return]


@_normed_projection.register_fake
def _(
    o: Tensor,
    gate: Tensor | None,
    gain: Tensor,
    weight: Tensor,
    groups: int,
    activation: str,
    gate_first: bool,
    eps: float,
) -> Tensor:
    return o.new_empty(*o.shape[:2], weight.shape[0])


def _keep_projection(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.ways = inputs[4:]


def _projection_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    *given, weight = ctx.saved_tensors
    *gradients, y = _gated_norm_gradients(d_out @ weight, *given, *ctx.ways, True)
    d_weight = d_out.flatten(0, 1).mT @ y.flatten(0, 1)
    found = (None if tensor is None else d for tensor, d in zip(given, gradients, strict=True))
    return *found, d_weight, None, None, None, None


_normed_projection.register_autograd(_projection_backward, setup_context=_keep_projection)


def gated_norm(o: Tensor, gate: Tensor | None, gain: Tensor, *, activation: str, eps: float) -> Tensor:
    """Normalize each head by its root mean square, times the gain, times activation(gate).

    Args:
        o: [B, T, H, V].
        gate: [B, T, H V], or None for none.
        gain: [V].

    Returns:
        [B, T, H V] in o's dtype.
    """
    if has_fused_kernels(o.device, o.dtype):
        return _gated_norm(o, gate, gain, o.shape[2], activation, False, eps)  # type: ignore[no-any-return]
    y = F.rms_norm(o, (o.shape[3],), gain.to(o.dtype), eps).flatten(-2)
    return y if gate is None else y * ACTIVATIONS[activation](gate)


def project_gated_norm(
    o: Tensor, gate: Tensor | None, gain: Tensor, weight: Tensor, *, activation: str, eps: float
) -> Tensor:
    """Project gated_norm(o, gate, gain) by weight [N, H V] to [B, T, N] in o's dtype; kept are o and the gate alone."""
    if has_fused_kernels(o.device, o.dtype):
        ways = (o.shape[2], activation, False, eps)
        return _normed_projection(o, gate, gain, weight.to(o.dtype), *ways)  # type: ignore[no-any-return]
    return recomputed(_project, partial(gated_norm, activation=activation, eps=eps), weight, o, gate, gain)


def norm_of_gated(o: Tensor, gate: Tensor, gain: Tensor, *, groups: int, eps: float) -> Tensor:
    """Normalize o silu(gate) by the root mean square of each of `groups` groups of channels, times the gain.

    Args:
        o: [B, T, H, P].
        gate: [B, T, H P].
        gain: [H P].

    Returns:
        [B, T, H P] in o's dtype.
    """
    if has_fused_kernels(o.device, o.dtype):
        return _gated_norm(o, gate, gain, groups, "silu", True, eps)  # type: ignore[no-any-return]
    y = (o.flatten(-2) * F.silu(gate)).unflatten(-1, (groups, -1))
    return F.rms_norm(y, y.shape[-1:], eps=eps).flatten(-2) * gain.to(y.dtype)


def project_norm_of_gated(o: Tensor, gate: Tensor, gain: Tensor, weight: Tensor, *, groups: int, eps: float) -> Tensor:
    """Project norm_of_gated(o, gate, gain) likewise."""
    if has_fused_kernels(o.device, o.dtype):
        return _normed_projection(o, gate, gain, weight.to(o.dtype), groups, "silu", True, eps)  # type: ignore[no-any-return]
    return recomputed(_project, partial(norm_of_gated, groups=groups, eps=eps), weight, o, gate, gain)


def _project(norm: Callable[..., Tensor], weight: Tensor, *arguments: Any) -> Tensor:
    return F.linear(norm(*arguments), weight)
