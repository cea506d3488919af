"""Measures what an eager forward and backward of `lasp.linear_attention` cost the host, and where the time goes.

    python benchmarks/host_cost.py                                  # on a GPU; a table
    python benchmarks/host_cost.py --profile --output benchmarks/results

The sequence is so short that the GPU is never waited for. Times are medians over rounds of calls queued one after
another between two synchronisations. `both on one thread` has the backward pass on the calling thread: what it lacks of
`both` is autograd's hand-over to its own, which a whole model pays once, not once a layer. `--profile` adds, per kind
of decay, the functions that take most of the time, on one thread too, since cProfile does not see autograd's own (it
makes Python slower: read the shares, not the times).
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lasp

KINDS = ("none", "constant", "scalar", "channel")
SHAPE = (1, 256, 16, 128)  # B, T, H, D
ROUNDS, CALLS, WARM_UP = 15, 20, 10


def inputs(kind: str) -> dict[str, Any]:
    B, T, H, D = SHAPE
    random = torch.Generator("cuda").manual_seed(0)
    q, k, v, d_o = (torch.randn(SHAPE, device="cuda", generator=random).bfloat16() for _ in range(4))
    gate_shape = {"none": None, "constant": (H,), "scalar": (B, T, H), "channel": (B, T, H, D)}[kind]
    g = None if gate_shape is None else -0.02 * torch.rand(gate_shape, device="cuda", generator=random)
    wanted = [q, k, v] + ([g] if g is not None and g.dim() > 1 else [])
    for tensor in wanted:
        tensor.requires_grad_()
    return {"inputs": (q, k, v, g), "wanted": wanted, "d_o": d_o}


def forward(x: dict[str, Any], backend: str) -> Tensor:
    return lasp.linear_attention(*x["inputs"], backend=backend)[0]


def both(x: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    return torch.autograd.grad(forward(x, backend), x["wanted"], x["d_o"])


def host_milliseconds(call: Callable[[], Any]) -> dict[str, float]:
    """Per call: until `call` returns, with nothing waited for."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(1e3 * (time.perf_counter() - start) / CALLS)
    torch.cuda.synchronize()
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
    parser.add_argument("--lines", type=int, default=18)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {SHAPE}, host ms per call: median (least, most)")
    rows = {}
    for kind in options.kinds:
        x = inputs(kind)
        rows[kind] = {
            "forward": host_milliseconds(partial(forward, x, options.backend)),
            "both": host_milliseconds(partial(both, x, options.backend)),
        }
        with torch.autograd.set_multithreading_enabled(False):
            rows[kind]["both on one thread"] = host_milliseconds(partial(both, x, options.backend))
        cells = (f"{name} {ms['median']:.3f} ({ms['min']:.3f}, {ms['max']:.3f})" for name, ms in rows[kind].items())
        print(f"{kind:10}", "   ".join(cells), flush=True)
    if options.output is not None:
        result = {"device": device, "torch": torch.__version__, "shape": SHAPE, "host_ms": rows}
        name = f"host-cost-{device.replace(' ', '-').lower()}.json"
        (options.output / name).write_text(json.dumps(result, indent=1))
    if options.profile:
        for kind in options.kinds:
            x = inputs(kind)
            with torch.autograd.set_multithreading_enabled(False):
                print(f"\n== {kind}\n{profile(partial(both, x, options.backend), options.lines)}", flush=True)


if __name__ == "__main__":
    main()
