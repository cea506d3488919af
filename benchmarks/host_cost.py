"""Measures what an eager forward and backward of `lasp.linear_attention` cost the host, and where the time goes.

    python benchmarks/host_cost.py                                  # on a GPU; a table
    python benchmarks/host_cost.py --profile --output benchmarks/results
    python benchmarks/host_cost.py --stubbed                        # without a GPU: nothing is launched

The sequence is so short that the GPU is never waited for. Times are medians over rounds of calls queued one after
another between two synchronisations. `both on one thread` has the backward pass on the calling thread: what it lacks of
`both` is autograd's hand-over to its own, which a whole model pays once, not once a layer. `--profile` adds, per kind
of decay, the functions that take most of the time, on one thread too, since cProfile does not see autograd's own (it
makes Python slower: read the shares, not the times). `--stubbed` puts tensors of a CPU in the place of a GPU's and
nothing in that of Triton's binaries: what is left is what this library, PyTorch's dispatcher and autograd do on a host.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import importlib
import io
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from outputs import folder
from torch import Tensor

import lasp

KINDS = ("none", "constant", "scalar", "channel")
SHAPE = (1, 256, 16, 128)  # B, T, H, D
STUBBED_SHAPE = (1, 64, 2, 64)  # a CPU's own operations, such as the check of gates, shall be short
ROUNDS, CALLS, WARM_UP = 60, 5, 10


class _Limits(NamedTuple):
    """Limits of the device that stubbed launches are planned for."""

    processors: int = 132
    shared_bytes: int = 232448
    hopper: bool = True


class CudaLauncher:
    """Stands for Triton's of this name, which most binaries have."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False
    arg_annotations = kernel_signature = ()

    @staticmethod
    def launch(*_: object) -> None: ...


def stub_launches() -> None:
    """Let tensors of the CPU pass for a GPU's, and binaries of Triton do nothing, in this process for good."""
    importlib.import_module("lasp.kernels.triton.decay.stages")
    binary = SimpleNamespace(run=CudaLauncher(), function=0, packed_metadata=())
    triton.JITFunction.__getitem__ = lambda kernel, grid: lambda *given, **named: binary  # type: ignore[method-assign]
    triton.runtime.driver.set_active(SimpleNamespace(get_current_stream=lambda device: 0))
    torch.Tensor.get_device = lambda tensor: 0  # type: ignore[assignment, method-assign]
    torch._C._cuda_getDevice = lambda: 0  # type: ignore[attr-defined]
    torch.cuda.device = nullcontext  # type: ignore[assignment, misc]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[misc]
    # Where that is known differs from revision to revision (`compare.py`).
    known = [
        found for name in sorted(sys.modules) if isinstance(found := getattr(sys.modules[name], "_devices", None), dict)
    ]
    for devices in known:
        devices[torch.device("cpu")] = _Limits()


def inputs(kind: str, *, stubbed: bool = False) -> dict[str, Any]:
    """Tensors of a call, on a GPU; `stubbed`: on the CPU (`stub_launches`)."""
    shape, device = (STUBBED_SHAPE, "cpu") if stubbed else (SHAPE, "cuda")
    B, T, H, D = shape
    random = torch.Generator(device).manual_seed(0)
    q, k, v, d_o = (torch.randn(shape, device=device, generator=random).bfloat16() for _ in range(4))
    gate_shape = {"none": None, "constant": (H,), "scalar": (B, T, H), "channel": (B, T, H, D)}[kind]
    g = None if gate_shape is None else -0.02 * torch.rand(gate_shape, device=device, generator=random)
    wanted = [q, k, v] + ([g] if g is not None and g.dim() > 1 else [])
    for tensor in wanted:
        tensor.requires_grad_()
    return {"inputs": (q, k, v, g), "wanted": wanted, "d_o": d_o}


def forward(x: dict[str, Any], backend: str) -> Tensor:
    return lasp.linear_attention(*x["inputs"], backend=backend)[0]


def both(x: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    return torch.autograd.grad(forward(x, backend), x["wanted"], x["d_o"])


def host_milliseconds(call: Callable[[], Any], rounds: int = ROUNDS, warm_up: int = WARM_UP) -> dict[str, float]:
    """Per call: until `call` returns, with nothing waited for and no garbage collected."""
    for _ in range(warm_up):
        call()
    gc.collect()
    gc.disable()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(1e3 * (time.perf_counter() - start) / CALLS)
    torch.cuda.synchronize()
    gc.enable()
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def profile(call: Callable[[], Any], lines: int) -> str:
    profiler = cProfile.Profile()
    torch.cuda.synchronize()
    profiler.enable()
    for _ in range(200):
        call()
    profiler.disable()
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(lines)
    return text.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--stubbed", action="store_true", help="on a CPU, without launching anything")
    parser.add_argument("--lines", type=int, default=18)
    parser.add_argument("--output", type=folder)
    options = parser.parse_args()

    if options.stubbed:
        stub_launches()
    device = "CPU, launches stubbed" if options.stubbed else torch.cuda.get_device_name()
    shape = STUBBED_SHAPE if options.stubbed else SHAPE
    print(f"{device}, torch {torch.__version__}, {shape}, host ms per call: median (least, most)")
    rows = {}
    for kind in options.kinds:
        x = inputs(kind, stubbed=options.stubbed)
        rows[kind] = {
            "forward": host_milliseconds(partial(forward, x, options.backend)),
            "both": host_milliseconds(partial(both, x, options.backend)),
        }
        with torch.autograd.set_multithreading_enabled(False):
            rows[kind]["both on one thread"] = host_milliseconds(partial(both, x, options.backend))
        cells = (f"{name} {ms['median']:.3f} ({ms['min']:.3f}, {ms['max']:.3f})" for name, ms in rows[kind].items())
        print(f"{kind:10}", "   ".join(cells), flush=True)
    if options.output is not None:
        result = {"device": device, "torch": torch.__version__, "shape": shape, "host_ms": rows}
        name = f"host-cost-{device.replace(',', '').replace(' ', '-').lower()}.json"
        (options.output / name).write_text(json.dumps(result, indent=1))
    if options.profile:
        for kind in options.kinds:
            x = inputs(kind, stubbed=options.stubbed)
            with torch.autograd.set_multithreading_enabled(False):
                print(f"\n== {kind}\n{profile(partial(both, x, options.backend), options.lines)}", flush=True)


if __name__ == "__main__":
    main()
