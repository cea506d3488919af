"""Shows where a forward and backward pass of the decay family spends its time, kernel by kernel, on one GPU.

    python benchmarks/kernel_profile.py                                  # shape of docs/results/kernels.md
    python benchmarks/kernel_profile.py --kinds channel --shape short
    python benchmarks/kernel_profile.py --kinds channel --strongest 20   # gates per channel too strong for one middle

Times are PyTorch's profiler's, a mean of five passes after three that are not counted; beside them the forward pass and
both passes as replayed CUDA graphs (medians, `benchmarks/kernels.py`).
"""

from __future__ import annotations

import argparse
from collections import Counter

import kernels as benchmark
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

PASSES, WARM_UP = 5, 3


def profiled(x: dict[str, Tensor]) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds and launches of each kernel in a pass."""
    for _ in range(WARM_UP):
        benchmark.step(benchmark.ours, x)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as result:
        for _ in range(PASSES):
            benchmark.step(benchmark.ours, x)
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in result.events():
        if event.device_type.name == "CUDA":
            times[event.name] += event.device_time / PASSES / 1e3
            launches[event.name] += 1
    return times, launches


def graphs(x: dict[str, Tensor]) -> tuple[float, float]:
    detached = {name: tensor.detach() for name, tensor in x.items()}
    forward = benchmark.graph_milliseconds(lambda: benchmark.ours(detached))
    both = benchmark.graph_milliseconds(lambda: benchmark.step(benchmark.ours, x))
    return forward["median"], both["median"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=benchmark.KINDS, default=list(benchmark.KINDS))
    parser.add_argument("--shape", choices=tuple(benchmark.SHAPES), default="main")
    parser.add_argument("--strongest", type=float, default=benchmark.SLOWEST_DECAY, help="gates go down to minus this")
    options = parser.parse_args()

    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copy {benchmark.copy_bytes_per_second() / 1e12:.2f} TB/s")
    shape = benchmark.SHAPES[options.shape]
    for kind in options.kinds:
        x = benchmark.inputs(shape, kind, strongest=options.strongest)
        times, launches = profiled(x)
        print(f"== {kind} {shape} gates down to {-options.strongest} total {sum(times.values()):.3f} ms")
        for name, milliseconds in times.most_common(12):
            print(f"  {milliseconds:8.3f} ms x{launches[name] // PASSES}  {name[:80]}")
        forward, both = graphs(x)
        print(f"  graph forward {forward:.3f} both {both:.3f}", flush=True)


if __name__ == "__main__":
    main()
