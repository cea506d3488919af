"""Launches at little cost to the host.

Triton's own call looks at every argument to find the binary that fits it, tens of microseconds a call: more than
many kernels here run. What decides the binary of our kernels is known without looking (integers are not
specialised, pointers are aligned), so it is found by a short key after the first call.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

ALIGNMENT = 16
_compiled: dict[Any, Any] = {}


_scratch_of_stream: dict[int | None, Tensor] = {}


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory in which programs write their tensor descriptors.

    Kernels of one stream follow one another, so they share it. A captured graph keeps its own.
    """
    kept = _scratch_of_stream.get(stream)
    if kept is not None and kept.numel() >= size and kept.device.index == torch.cuda.current_device():
        return kept
    fresh = torch.empty(size, dtype=torch.int8, device="cuda")
    if not torch.cuda.is_current_stream_capturing():
        _scratch_of_stream[stream] = fresh
    return fresh


def use_scratch() -> None:
    """Gives Triton its allocator. It keeps one per thread, and autograd's threads are not the caller's."""
    triton.set_allocator(_scratch)


def launch(
    kernel: Any,
    grid: tuple[int, int],
    tensors: tuple[Tensor, ...],
    scalars: tuple[int | float, ...],
    constants: tuple[Any, ...],
    warps: int,
    stages: int,
) -> None:
    """Runs `kernel` over `grid` with pointers to `tensors`, then `scalars`, then `constants`.

    Scalars must be ones that the kernel does not specialise; constants are its constexprs.
    """
    if 0 in grid:
        return
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, scalars, constants, warps, stages)
        return
    pointers = 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    aligned = pointers % ALIGNMENT == 0
    key = (id(kernel), device, constants, warps, stages, tuple([tensor.dtype for tensor in tensors]))
    compiled = _compiled.get(key) if aligned else None
    if compiled is None:
        compiled = kernel[grid](*tensors, *scalars, *constants, num_warps=warps, num_stages=stages)
        if aligned and device.type == "cuda":
            _compiled[key] = compiled
    else:
        compiled[(*grid, 1)](*tensors, *scalars, *constants)
