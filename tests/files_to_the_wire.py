"""Counts the files that a reader follows from an operator to the wire: `python tests/files_to_the_wire.py [BACKEND]`.

Two ranks call `lasp.linear_attention`; printed are the files of the package in which one of them calls a function
during a forward pass, other than the first. Of kernels, which Triton compiles, these are the files of those launched
and the kernels' files that they import.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lasp"
BACKENDS, GATES = ("torch", "triton"), ("none", "scalar", "channel")


def files_called(rank: int, ways: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Files of the second forward pass of every backend and gate on this rank, one of two in a process group."""
    import torch.distributed as dist

    import lasp

    sp = lasp.SequenceParallel(dist.group.WORLD, exchange="ring")
    return [_files_called(sp, backend, gate) for backend, gate in ways]


def _files_called(sp: Any, backend: str, gate: str) -> list[str]:
    import torch

    import lasp

    q, k, v = (torch.randn(1, 16, 1, 16) for _ in range(3))
    g = {"none": None, "scalar": -torch.rand(1, 16, 1), "channel": -torch.rand(1, 16, 1, 16)}[gate]
    found: set[str] = set()
    launched: set[str] = set()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(SOURCE) and frame.f_code.co_name != "<module>":
            found.add(path.relative_to(SOURCE).as_posix())

    def attend() -> None:
        lasp.linear_attention(q, k, v, g, sp=sp, backend=backend)

    attend()
    with noting_launches(launched) if backend == "triton" else nullcontext():
        sys.setprofile(profile)
        attend()
        sys.setprofile(None)
    return sorted(found | kernel_files(launched))


@contextmanager
def noting_launches(modules: set[str]) -> Iterator[None]:
    """Adds the modules of the kernels launched meanwhile. What the interpreter calls of them is not the host's."""
    from lasp.kernels.triton.common.launch import BoundKernel

    run = BoundKernel.run

    def noted(self: BoundKernel, tensors: dict[str, Any]) -> None:
        modules.add(self.kernel.fn.__module__)
        profile = sys.getprofile()
        sys.setprofile(None)
        run(self, tensors)
        sys.setprofile(profile)

    BoundKernel.run = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        BoundKernel.run = run  # type: ignore[method-assign]


def holds_kernels(path: Path) -> bool:
    return "@triton.jit" in path.read_text()


def kernel_files(modules: set[str]) -> set[str]:
    """The files of these modules and those that hold kernels too which they import, and so on."""
    found: set[str] = set()
    left = sorted(modules)
    while left:
        path = Path(importlib.import_module(left.pop()).__file__ or "")
        name = path.relative_to(SOURCE).as_posix()
        if name not in found and holds_kernels(path):
            found.add(name)
            nodes = ast.walk(ast.parse(path.read_text()))
            left += [
                node.module for node in nodes
                if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("lasp.")
            ]  # fmt: skip
    return found


def files_to_the_wire(*ways: tuple[str, str]) -> list[list[str]]:
    """Files of either rank, for every backend and gate."""
    from functools import partial

    from benchmarks.processes import run

    ranks = run(2, partial(files_called, ways=ways))
    return [sorted({*first, *second}) for first, second in zip(*ranks, strict=True)]


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    os.environ.setdefault("TRITON_INTERPRET", "1")
    ways = [
        (backend, gate) for backend in sys.argv[1:] or ("torch", "triton") for gate in ("none", "scalar", "channel")
    ]
    for (backend, gate), files in zip(ways, files_to_the_wire(*ways), strict=True):
        print(f"{backend}, gate {gate}: {len(files)} files", *files, sep="\n    ")


if __name__ == "__main__":
    main()
