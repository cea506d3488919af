"""Compares what mixers do beside their recurrence, fused and in PyTorch, on one GPU: error against fp64, time, bytes.

    python benchmarks/neighbours.py --output benchmarks/results
    python benchmarks/neighbours.py --configurations     # every launch that the plan could take, too

bf16, shapes of the 1b models. Times are medians of captured graphs or of plain calls; `floor` is each input read once
and each output written once at the device's copy speed, measured here. Exit code 1 where an error exceeds its bound.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from outputs import folder
from torch import Tensor

from lasp.halo.functions import short_convolution
from lasp.kernels.select import has_fused_kernels
from lasp.kernels.triton.neighbours import launches
from lasp.layers import fused

BF16, BOUND = torch.bfloat16, 8e-3
Case = tuple[str, Callable[..., Any], dict[str, Tensor]]


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def cases(tokens: int) -> Iterator[Case]:
    """Cases of mamba2-1b, gated-deltanet-1b and gla-1b: name, function of its tensors, the tensors."""
    for name, channels, bias in (("convolution, mamba2", 4352, True), ("convolution, gated-deltanet", 6144, False)):
        x = {"x": normal(1, tokens, channels), "weight": normal(channels, 4)}
        yield name, convolve, x | ({"bias": normal(channels)} if bias else {})
    fp32 = torch.float32
    given = {"o": normal(1, tokens, 64, 64), "gate": normal(1, tokens, 4096), "gain": normal(4096, dtype=fp32)}
    yield "gated norm, mamba2", first_norm, given
    for name, heads in (("gated norm, gated-deltanet", 6), ("gated norm, gla", 4)):
        x = {"o": normal(1, tokens, heads, 512), "gate": normal(1, tokens, heads * 512)}
        yield name, head_norm, x | {"gain": normal(512, dtype=fp32)}


def convolve(**x: Tensor) -> Tensor:
    return short_convolution(**x, activation="silu")[0]  # type: ignore[arg-type]


def first_norm(**x: Tensor) -> Tensor:
    return fused.norm_of_gated(**x, groups=1, eps=1e-5)


def head_norm(**x: Tensor) -> Tensor:
    return fused.gated_norm(**x, activation="silu", eps=1e-5)


def both(function: Callable[..., Any], x: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients for outputs' gradients that are the same each time."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    outputs = function(**leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    random = torch.Generator("cuda").manual_seed(1)
    d = [torch.randn(y.shape, device="cuda", generator=random).to(BF16).to(y.dtype) for y in outputs]
    return outputs, list(torch.autograd.grad(outputs, list(leaves.values()), d))


def error(function: Callable[..., Any], x: dict[str, Tensor]) -> float:
    """The largest relative one of all results."""
    found = [t for part in both(function, x) for t in part]
    exact = [t for part in both(function, {n: t.double() for n, t in x.items()}) for t in part]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


def milliseconds(call: Callable[[], object], repetitions: int = 20) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repetitions):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def in_pytorch() -> Any:
    return patch.multiple("lasp.halo.functions", has_fused_kernels=lambda *_: False), patch.object(
        fused, "has_fused_kernels", lambda *_: False
    )


def timed(function: Callable[..., Any], x: dict[str, Tensor]) -> dict[str, float]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    forward = milliseconds(lambda: function(**leaves))
    outputs = function(**leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    d = [torch.ones_like(y) for y in outputs]
    wanted = list(leaves.values())
    backward = milliseconds(lambda: torch.autograd.grad(outputs, wanted, d, retain_graph=True))
    return {"forward_ms": forward, "backward_ms": backward}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--configurations", action="store_true")
    parser.add_argument("--output", type=folder)
    arguments = parser.parse_args()
    assert has_fused_kernels(torch.device("cuda"), BF16)
    large = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    copied = torch.empty_like(large)
    speed = 2 * large.numel() / milliseconds(lambda: copied.copy_(large)) * 1e3
    rows, worst = [], 0.0
    for name, function, x in cases(arguments.tokens):
        small = {n: t[:, : 1000 + 37] if t.dim() > 2 else t for n, t in x.items()}
        row: dict[str, Any] = {"case": name, "error": error(function, small), "fused": timed(function, x)}
        first, second = in_pytorch()
        with first, second:
            row["torch"] = timed(function, x)
        outputs, _ = both(function, x)
        read, written = (sum(t.nbytes for t in part) for part in (x.values(), outputs))
        row["floor"] = {"forward_ms": (read + written) / speed * 1e3, "backward_ms": (2 * read + written) / speed * 1e3}
        if arguments.configurations:
            row["configurations"] = dict(configurations(function, x, small))
        worst = max(worst, row["error"])
        rows.append(row)
        print(json.dumps(row), flush=True)
    figures = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": "bf16",
        "tokens": arguments.tokens,
        "copy_bytes_per_s": speed,
        "rows": rows,
    }
    if arguments.output is not None:
        device = torch.cuda.get_device_name().lower().replace(" ", "-")
        path = arguments.output / f"{datetime.date.today()}-{device}-neighbours.json"
        path.write_text(json.dumps(figures, indent=1) + "\n")
    return int(not worst <= BOUND)


def configurations(
    function: Callable[..., Any], x: dict[str, Tensor], small: dict[str, Tensor]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Other launches: their errors and times."""
    if function is convolve:
        ways = [
            {"INTERVALS": s, "LENGTH": n, "CHANNELS": c}
            for s, n, c in ((8, 64, 64), (16, 64, 64), (8, 32, 64), (8, 64, 128), (16, 32, 32), (8, 128, 64))
        ]
    else:
        ways = [{"ELEMENTS": e, "SUMMED": n} for e, n in itertools.product((1024, 4096), (1 << 16, 1 << 18))]
    for way in ways:
        made = (launches._convolution, launches._gated_norm)
        with ExitStack() as stack:
            for name, value in way.items():
                stack.enter_context(patch.object(launches, name, value))
            for cached in made:
                cached.cache_clear()
            yield str(way), {"error": error(function, small), **timed(function, x)}
        for cached in made:
            cached.cache_clear()


if __name__ == "__main__":
    raise SystemExit(main())
