"""Launches at little cost to the host.

Triton's own call looks at every argument to find the binary that fits it, and hands what it launches to profilers'
hooks: tens of microseconds a call, more than many kernels here run. What decides the binary of our kernels is known
without looking (integers are not specialised, pointers are aligned), so it is found by a short key after the first
call, and its launcher is called with plain addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

ALIGNMENT = 16
_launchers: dict[Any, Callable[..., None]] = {}
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


def _watched() -> bool:
    """Whether a profiler wants to see every launch."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _launcher(compiled: Any) -> Callable[..., None]:
    """Launches a binary: (grid's two sizes, stream, addresses, scalars and constants in the kernel's order)."""
    try:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        _watched()
    except AttributeError:  # another Triton than 3.6 to 3.7, where these are
        return lambda x, y, stream, *arguments: compiled[x, y, 1](*arguments)

    def launch(x: int, y: int, stream: int, *arguments: Any) -> None:
        if _watched():
            compiled[x, y, 1](*arguments)
        else:
            run(x, y, 1, stream, function, metadata, None, None, None, *arguments)

    return launch


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
    x, y = grid
    if x == 0 or y == 0:
        return
    device = tensors[0].get_device()
    if device < 0:
        kernel[grid](*tensors, *scalars, *constants, num_warps=warps, num_stages=stages)
        return
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, scalars, constants, warps, stages)
        return
    addresses = [tensor.data_ptr() for tensor in tensors]
    together = 0
    for address in addresses:
        together |= address
    key = (id(kernel), device, constants, warps, stages, *[tensor.dtype for tensor in tensors])
    found = _launchers.get(key) if together % ALIGNMENT == 0 else None
    if found is not None:
        found(x, y, driver.active.get_current_stream(device), *addresses, *scalars, *constants)
        return
    compiled = kernel[grid](*tensors, *scalars, *constants, num_warps=warps, num_stages=stages)
    if together % ALIGNMENT == 0:
        _launchers[key] = _launcher(compiled)
