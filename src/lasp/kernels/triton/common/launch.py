"""Launches at little cost to the host.

Triton's own call looks at every argument to find the binary that fits it, and hands what it launches to profilers'
hooks: tens of microseconds a call, more than many kernels here run. What decides the binary of our kernels is known
without looking (integers are not specialised, pointers are aligned), so a kernel is bound to all that the shapes decide
once (`Launch`), and a call is one of its binary's C launcher with plain addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, cast

import torch
import triton
from torch import Tensor
from triton.runtime import driver

ALIGNMENT = 16
_Start = Callable[[tuple[int, ...]], None]  # takes addresses
_scratch_of_stream: dict[int | None, Tensor] = {}
_hooks = triton.knobs.runtime


def _use_scratch() -> None:
    """Gives Triton its allocator. It keeps one per thread, and autograd's threads are not the caller's."""
    triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory in which programs write their tensor descriptors.

    Kernels of one stream follow one another, so they share it. A captured graph keeps its own.
    """
    capturing = torch.cuda.is_current_stream_capturing()
    kept = None if capturing else _scratch_of_stream.get(stream)
    if kept is not None and kept.numel() >= size and kept.device.index == torch.cuda.current_device():
        return kept
    fresh = torch.empty(size, dtype=torch.int8, device="cuda")
    if not capturing:
        _scratch_of_stream[stream] = fresh
    return fresh


def given(tensor: Tensor | None, unread: Tensor) -> Tensor:
    """The argument of a kernel that reads `tensor`: `unread` in the place of None, where it reads none."""
    return unread if tensor is None else tensor


class Launch(Protocol):
    """Runs a kernel on tensors, by name: whenever it is called, of the same dtypes and on the same device.

    The last of the kernel's, or always the same last ones, may be None where it can do without them.
    """

    of: BoundKernel

    def __call__(self, **tensors: Tensor | None) -> None: ...


def bind(
    kernel: Any, grid: tuple[int, int], fixed: dict[str, Any], *, warps: int, stages: int, **options: int
) -> Launch:
    """Returns a launch of `kernel`.

    Args:
        kernel: its tensors come first among its parameters.
        grid: programs along both axes.
        fixed: scalars that the kernel does not specialise, and its constexprs: all that it takes but tensors.
        warps, stages, options: the compiler's.
    """
    of = BoundKernel(kernel, grid, fixed, {"num_warps": warps, "num_stages": stages, **options})
    launch = _maker(of.tensors)(of)
    launch.of = of
    return launch


class BoundKernel:
    """A kernel with its grid and all that it takes but tensors, by name.

    Attributes:
        tensors: names of those.
        starts: of its binaries with the last tensor, and without; None until they are known.
        device: on which they are.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int], fixed: dict[str, Any], options: dict[str, int]) -> None:
        names = kernel.arg_names
        self.tensors = tuple(names[: len(names) - len(fixed)])
        assert set(names[len(self.tensors) :]) == set(fixed), f"{kernel} takes {names}, not {tuple(fixed)} at the end"
        self.kernel, self.grid, self.fixed, self.options = kernel, grid, fixed, options
        self.starts: list[_Start | None] = [None, None]
        self.device = -1
        self._others = tuple(fixed[name] for name in names[len(self.tensors) :])
        self._dtypes: dict[str, torch.dtype] = {}

    def run(self, tensors: dict[str, Tensor | None]) -> None:
        """Launches what its `Launch` does not: what is not known yet, and what Triton must see."""
        if self.starts[tensors[self.tensors[-1]] is None] is None:
            self._first(tensors)
        else:
            self._by_triton(tensors)

    def _first(self, tensors: dict[str, Tensor | None]) -> None:
        if 0 in self.grid:
            return
        given = {name: tensor for name in self.tensors if (tensor := tensors[name]) is not None}
        assert (*given,) == self.tensors[: len(given)], f"only the last tensors of {self.kernel} may be None"
        # A binary reads addresses as the dtypes it was made for. In the interpreter every call comes here.
        for name, tensor in given.items():
            known = self._dtypes.setdefault(name, tensor.dtype)
            assert tensor.dtype == known, f"a launch of {self.kernel} for {name} in {known} got {tensor.dtype}"
        self.device = next(iter(given.values())).get_device()
        compiled = self._by_triton(tensors)
        if self.device >= 0 and all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in given.values()):
            self.starts[tensors[self.tensors[-1]] is None] = _start_of(compiled, self.grid, self._others, self.device)

    def _by_triton(self, tensors: dict[str, Tensor | None]) -> Any:
        """Leaves the launch to Triton, which finds the binary, calls hooks, and gives the binary."""
        _use_scratch()
        with torch.cuda.device(self.device):  # of no effect below 0
            return self.kernel[self.grid](**tensors, **self.fixed, **self.options)


@cache
def _maker(names: tuple[str, ...]) -> Callable[[BoundKernel], Launch]:
    """Makes launches that take tensors of these names.

    Written out for them, as `namedtuple` writes a class: to collect keywords in a dictionary, and to pick them from it
    in the kernel's order, takes the host as long as all the rest of a launch.
    """
    addresses = [f"_{n} = 0 if {name} is None else {name}.data_ptr()" for n, name in enumerate(names)]
    ordered = [f"_{n}" for n in range(len(names))]
    # With hooks a profiler wants to see every launch.
    source = f"""
def make(of):
    starts = of.starts
    def launch(*, {", ".join(names)}):
        start = starts[{names[-1]} is None]
        watched = _hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls
        if start is not None and not watched and torch._C._cuda_getDevice() == of.device:
            {"; ".join(addresses)}
            if not ({" | ".join(ordered)}) % ALIGNMENT:
                start(({", ".join(ordered)},))
                return
        of.run({{{", ".join(f"'{name}': {name}" for name in names)}}})
    return launch
"""
    made: dict[str, Any] = {}
    exec(source, globals(), made)
    return cast(Callable[[BoundKernel], Launch], made["make"])


def _start_of(compiled: Any, grid: tuple[int, int], others: tuple[Any, ...], device: int) -> _Start | None:
    """A function that launches a binary over `grid`, with `others` after the addresses; None for an unknown Triton."""
    x, y = grid
    try:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    except AttributeError:
        return None
    # CUDA's launcher is a Python object around a function in C. All it adds is the memory that some binaries ask for.
    if type(run).__name__ == "CudaLauncher" and run.global_scratch_size == run.profile_scratch_size == 0:
        launch, attributes = run.launch, (run.launch_cooperative_grid, run.launch_pdl)
        if triton.__version__.startswith("3.6."):
            start = (function, *attributes, None, None, metadata, None, None, None)
            return lambda addresses: launch(
                x, y, 1, driver.active.get_current_stream(device), *start, *addresses, *others
            )
        if triton.__version__.startswith("3.7."):
            start = (function, *attributes, metadata, *[None] * 5, run.arg_annotations, run.kernel_signature)
            return lambda addresses: launch(
                x, y, 1, driver.active.get_current_stream(device), *start, (*addresses, *others)
            )

    def start_with_memory(addresses: tuple[int, ...]) -> None:
        _use_scratch()
        run(
            x, y, 1, driver.active.get_current_stream(device), function, metadata, None, None, None, *addresses, *others
        )

    return start_with_memory
