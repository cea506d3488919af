"""Launches of what mixers do beside their recurrence.

Tensors are [B, T, ..], of 16 or 32 bits; those said to be strided may be slices of the last dim of a wider tensor. Sums
over tokens, the gradients of parameters, are taken in fp32, in parts of fixed size: the same bits each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lasp.kernels.triton.common.launch import Launch, bind, given
from lasp.kernels.triton.neighbours.convolution import convolution_gradient_kernel, convolution_kernel
from lasp.kernels.triton.neighbours.gated_norm import NONE, SIGMOID, SILU, gated_norm_gradient_kernel, gated_norm_kernel

ACTIVATIONS = {"none": NONE.value, "silu": SILU.value, "sigmoid": SIGMOID.value}
WARPS = 4
# Of loops over rows, whose loads are under way so many turns ahead.
STAGES, NORM_STAGES = 3, 4
# Intervals of a convolution's program, tokens of each, channels.
INTERVALS, LENGTH, CHANNELS = 8, 64, 64
MAX_PARTS = 3  # that a convolution's output is written in
# Elements of a program at a time, and of one that sums over them in all.
ELEMENTS, SUMMED = 2048, 1 << 17


def _strided(tensor: Tensor) -> Tensor:
    """It, if its rows lie at one distance and are dense; else a copy."""
    width = tensor.shape[2:].numel()
    row = tensor.stride(1) if tensor.shape[1] > 1 else max(tensor.stride(1), width)
    dense = tensor[0, 0].is_contiguous() if tensor.shape[0] and tensor.shape[1] else tensor.is_contiguous()
    even = tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * row
    return tensor if dense and even and row >= width else tensor.contiguous()


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Dtypes of all that a kernel reads. A launch is for these alone."""
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def _row(tensor: Tensor) -> int:
    return tensor.stride(1) if tensor.shape[1] > 1 else tensor.shape[2:].numel()


class _Convolution(NamedTuple):
    tokens: int
    row: int
    batch: int
    parts: tuple[int, ...]
    width: int
    beside: int
    bias: bool
    silu: bool
    packed: bool
    dtypes: tuple[torch.dtype | None, ...]


@lru_cache(maxsize=256)
def _convolution(shape: _Convolution, backward: bool) -> Launch:
    covered = shape.tokens + shape.width - 1 if backward else shape.tokens
    blocks = -(-covered // (INTERVALS * LENGTH))
    fixed: dict[str, Any] = {
        "T": shape.tokens, "blocks": blocks, "ROW": shape.row, "W": shape.width, "BIAS": shape.bias,
        "SILU": shape.silu, "PACKED": shape.packed, "S": INTERVALS, "LENGTH": LENGTH, "BC": CHANNELS,
        "STAGES": STAGES,
    }  # fmt: skip
    fixed |= {f"C{n}": width for n, width in enumerate(shape.parts)}
    if backward:
        fixed["D_ROW"] = sum(shape.parts) + shape.beside
    kernel = convolution_gradient_kernel if backward else convolution_kernel
    grid = (blocks * shape.batch, sum(-(-width // CHANNELS) for width in shape.parts))
    return bind(kernel, grid, fixed, warps=WARPS, stages=1)


def _shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    packed: bool,
    silu: bool,
    widths: Sequence[int],
    d_y: Tensor | None = None,
) -> _Convolution:
    batch, tokens, channels = x.shape
    dtypes = _dtypes(x, weight, bias, before, d_y)
    parts = (*widths, 0, 0)[:MAX_PARTS]
    beside = channels - sum(widths)
    return _Convolution(tokens, _row(x), batch, parts, weight.shape[1], beside, bias is not None, silu, packed, dtypes)


def _parts(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The arguments of the kernels' three parts; the first one for those that there are not."""
    return dict(zip(("first_ptr", "second_ptr", "third_ptr"), (*tensors, tensors[0], tensors[0]), strict=False))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    begins: Tensor | None,
    silu: bool,
    widths: Sequence[int],
) -> list[Tensor]:
    """y of x [B, T, C], strided, in up to three parts [B, T, widths[n]]; weight [C, W], bias [C], the rows before
    [B, W - 1, C], int32 [T] where each token's packed document begins. Further columns of x come last, as they are."""
    x, weight = _strided(x), weight.contiguous()
    parts = [torch.empty(*x.shape[:2], width, dtype=x.dtype, device=x.device) for width in widths]
    _convolution(_shape(x, weight, bias, before, begins is not None, silu, widths), False)(
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=given(bias, weight),
        **_parts(parts),
        begin_ptr=given(begins, weight),
        before_ptr=None if before is None else before.contiguous(),
    )
    rest = x[..., sum(widths) :]
    return [*parts, rest.clone(memory_format=torch.contiguous_format)] if rest.shape[2] else parts


def convolve_gradients(
    d_y: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    begins: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the rows before, of those of y's parts; of what there is not, something."""
    B, (C, W) = x.shape[0], weight.shape
    d_rest = d_y[-1] if x.shape[2] > C else None
    d_y = d_y if d_rest is None else d_y[:-1]
    x, weight, d_y = _strided(x), weight.contiguous(), [part.contiguous() for part in d_y]
    packed, widths = begins is not None, [part.shape[2] for part in d_y]
    launch = _convolution(_shape(x, weight, bias, before, packed, silu, widths, d_y[0]), True)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty(launch.of.grid[0], W + 1, C, dtype=torch.float32, device=x.device)
    d_before = x.new_empty(B, W - 1, C)
    launch(
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=given(bias, weight),
        **_parts(d_y),
        d_x_ptr=d_x,
        sums_ptr=sums,
        d_before_ptr=d_before,
        begin_ptr=given(begins, weight),
        before_ptr=None if before is None else before.contiguous(),
    )
    if d_rest is not None:
        d_x[..., C:] = d_rest
    total = sums.sum(0).to(weight.dtype)
    return d_x, total[:W].t().contiguous(), total[W].clone(), d_before


class _GatedNorm(NamedTuple):
    rows: int
    columns: int
    groups: int
    z_row: int
    gain: int
    activation: int
    gate_first: bool
    eps: float
    dtypes: tuple[torch.dtype | None, ...]


@lru_cache(maxsize=256)
def _gated_norm(shape: _GatedNorm, backward: bool, again: bool = False) -> Launch:
    columns = triton.next_power_of_2(shape.columns)
    rows = max(1, ELEMENTS // columns)
    warps = min(16, max(WARPS, rows * columns // 256))
    fixed: dict[str, Any] = {
        "eps": shape.eps, "count": shape.rows, "N": shape.columns, "BN": columns, "GROUPS": shape.groups,
        "Z_ROW": shape.z_row, "GAIN": shape.gain, "ACT": shape.activation, "GATE_FIRST": shape.gate_first, "R": rows,
    }  # fmt: skip
    kernel = gated_norm_gradient_kernel if backward else gated_norm_kernel
    if backward:
        fixed["AGAIN"], fixed["STAGES"] = again, NORM_STAGES
        own = shape.groups if shape.gain > 1 else 1
        count = shape.rows // own
        fixed["steps"] = max(1, min(SUMMED // (rows * columns), -(-count // rows)))
        grid = (-(-count // (rows * fixed["steps"])), own)
    else:
        grid = (-(-shape.rows // rows), 1)
    return bind(kernel, grid, {n: fixed[n] for n in kernel.arg_names if n in fixed}, warps=warps, stages=1)


class _NormCall(NamedTuple):
    """A launch, and what both passes read."""

    launch: Launch
    given: dict[str, Tensor]


def _norm_call(
    o: Tensor,
    z: Tensor | None,
    gain: Tensor,
    groups: int,
    activation: str,
    gate_first: bool,
    eps: float,
    d_y: Tensor | None = None,
    again: bool = False,
) -> _NormCall:
    """Return the call of the norm or, with d_y, of its gradients; again: and of its output."""
    o, z = o.contiguous(), None if z is None else _strided(z)
    width = o.shape[2:].numel()
    columns = width // groups
    shape = _GatedNorm(
        o.shape[0] * o.shape[1] * groups, columns, groups, 0 if z is None else _row(z), gain.numel() // columns,
        ACTIVATIONS["none" if z is None else activation], gate_first, eps, _dtypes(o, z, gain, d_y),
    )  # fmt: skip
    given = {
        "o_ptr": o,
        "z_ptr": o if z is None else z,
        "gain_ptr": gain.contiguous(),
    }
    return _NormCall(_gated_norm(shape, d_y is not None, again), given)


def gated_norm(
    o: Tensor,
    z: Tensor | None,
    gain: Tensor,
    groups: int,
    activation: str,
    gate_first: bool,
    eps: float,
) -> Tensor:
    """[B, T, D], normalized by groups of D / groups channels.

    Args:
        o: [B, T, D], or any dims that make D.
        z: likewise, strided; the gate.
        gain: [D / groups] for all groups alike, or [D].
    """
    launch, given = _norm_call(o, z, gain, groups, activation, gate_first, eps)
    y = torch.empty(*o.shape[:2], o.shape[2:].numel(), dtype=o.dtype, device=o.device)
    launch(**given, y_ptr=y)
    return y


def gated_norm_gradients(
    d_y: Tensor,
    o: Tensor,
    z: Tensor | None,
    gain: Tensor,
    groups: int,
    activation: str,
    gate_first: bool,
    eps: float,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of o, z and gain, and, if wanted `again`, the output; of what there is not, something."""
    launch, given = _norm_call(o, z, gain, groups, activation, gate_first, eps, d_y, again)
    width, o = o.shape[2:].numel(), given["o_ptr"]
    d_o, d_z = torch.empty_like(o), o.new_empty(0)
    if z is not None:
        d_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    y = torch.empty_like(d_y, memory_format=torch.contiguous_format) if again else o.new_empty(0)
    programs, own = launch.of.grid
    parts = (programs * own, width // groups) if gain.numel() * groups == width else (programs, gain.numel())
    d_gain = torch.empty(parts, dtype=torch.float32, device=o.device)
    launch(
        **given,
        d_y_ptr=d_y.contiguous(),
        d_o_ptr=d_o,
        d_z_ptr=d_o if z is None else d_z,
        y_ptr=y if again else d_o,
        d_gain_ptr=d_gain,
    )
    return d_o, d_z, d_gain.sum(0).to(gain.dtype), y
