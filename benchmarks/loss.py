"""The loss over a large vocabulary beside others: time, memory and error against fp64 on one GPU.

    python benchmarks/loss.py --output benchmarks/results
    python benchmarks/loss.py --tiny                                    # the script itself, on a CPU

fp32 weights and hidden states, bf16 autocast, forward and backward pass. `lasp` is lasp.models.loss, also in chunks of
other sizes; `plain` is PyTorch's over all logits; `checkpointed` takes 64 MiB of logits at a time and computes them
again in the backward pass. Libraries are measured where they are installed: `liger` (liger-kernel), `fla` (fla-core)
and `torch` (linear_cross_entropy of PyTorch 2.13, which wants 16-bit inputs). Times are medians of repetitions; peak
memory is what a call needs beyond its inputs, gradients included; errors are relative, of whole tensors. Exit code 1
where `lasp` misses a bound.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernels import peak_bytes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasp.models.loss import cross_entropy_sum

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# Relative errors of the loss and of the gradients of hidden and weight, whose logits bf16 rounds.
BOUNDS = (1e-4, 1e-2, 1e-2)


def problem(vocab: int, tokens: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [tokens, width] and weight [vocab, width], logits spread by 2; labels, one in a hundred ignored."""
    random = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, generator=random)
    weight = torch.randn(vocab, width, device=device, generator=random) * (2 / width**0.5)
    labels = torch.randint(vocab, (tokens,), device=device, generator=random)
    labels[::100] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def checkpointed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    size = max(128, (1 << 24) // weight.shape[0])
    chunks = zip(hidden.split(size), labels.split(size), strict=True)
    return torch.stack([checkpoint(plain, x, weight, y, use_reentrant=False) for x, y in chunks]).sum()


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")[0]


def fla(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

    return FusedLinearCrossEntropyLoss(reduction="sum")(hidden, labels, weight)


def torch_own(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, reduction="sum", options=options)


def in_chunks_of(tokens: int) -> Loss:
    return lambda hidden, weight, labels: cross_entropy_sum(hidden, weight, labels, chunk_tokens=tokens)


def losses(device: str) -> dict[str, Loss]:
    """Losses that can run here, by name."""
    found: dict[str, Loss] = {"lasp": cross_entropy_sum}
    found |= {f"lasp, chunks of {tokens}": in_chunks_of(tokens) for tokens in (1024, 2048, 4096, 8192)}
    found |= {"checkpointed": checkpointed, "plain": plain}
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["liger"] = liger
    if device == "cuda" and importlib.util.find_spec("fla"):
        found["fla"] = fla
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = torch_own
    return found


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, d_loss: float) -> list[Tensor]:
    """Loss and gradients in fp64 from PyTorch's own, a few tokens at a time."""
    wide = weight.detach().double().requires_grad_()
    total, d_hidden = torch.zeros((), dtype=torch.float64, device=hidden.device), []
    for x, y in zip(hidden.detach().split(1024), labels.split(1024), strict=True):
        x = x.double().requires_grad_()
        loss = plain(x, wide, y)
        (loss * d_loss).backward()
        total += loss.detach()
        assert x.grad is not None
        d_hidden.append(x.grad)
    assert wide.grad is not None
    return [total, torch.cat(d_hidden), wide.grad]


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any], device: str, repetitions: int) -> dict[str, float]:
    """Milliseconds of calls that are waited for."""
    times = []
    for _ in range(repetitions):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def measure(
    loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], reference: list[Tensor], d_loss: float
) -> dict[str, Any]:
    hidden, weight, labels = inputs
    device = hidden.device.type

    def forward() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss(hidden, weight, labels)

    def step() -> tuple[Tensor, ...]:
        value = forward()
        return value.detach(), *torch.autograd.grad(value * d_loss, (hidden, weight))

    try:
        results = step()  # the first call also compiles
        errors = list(map(relative_error, results, reference))
        del results
        # PyTorch does not count a CPU's memory.
        peak, times = peak_bytes(step) if device == "cuda" else None, milliseconds(step, device, 5)
        with torch.no_grad():
            scoring = milliseconds(forward, device, 3)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    return {"ms": times, "forward_only_ms": scoring, "peak_bytes": peak, "errors": errors}


def show(name: str, found: dict[str, Any]) -> None:
    if "out_of_memory" in found:
        print(f"  {name:22} out of memory")
        return
    peak = "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**30:6.2f} GiB"
    errors = " ".join(f"{error:.1e}" for error in found["errors"])
    times = f"{found['ms']['median']:8.1f} ms, forward only {found['forward_only_ms']['median']:7.1f} ms"
    print(f"  {name:22} {times} {peak}   loss, d_hidden, d_weight {errors}", flush=True)


def versions(device: str) -> dict[str, str]:
    found = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    for package in ("triton", "liger-kernel", "fla-core"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU")
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    width = 64 if options.tiny else 2048
    shapes = [(1000, 300)] if options.tiny else [(v, t) for v in (50_272, 151_936) for t in (8192, 32768)]
    results, good = [], True
    about = versions(device)
    print(", ".join(f"{name} {version}" for name, version in about.items()), flush=True)
    for vocab, tokens in shapes:
        print(f"vocabulary {vocab}, {tokens} tokens of width {width}", flush=True)
        inputs = problem(vocab, tokens, width, device)
        reference = exact(*inputs, 1 / tokens)
        for name, loss in losses(device).items():
            found = measure(loss, inputs, reference, 1 / tokens)
            show(name, found)
            results.append({"loss": name, "vocab": vocab, "tokens": tokens, "width": width, **found})
            if name.startswith("lasp"):
                good &= all(error < bound for error, bound in zip(found["errors"], BOUNDS, strict=True))
        del inputs, reference
    record = {"date": datetime.date.today().isoformat(), "versions": about, "results": results, "good": good}
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"{record['date']}-{about['device'].lower().replace(' ', '-')}-loss.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {path}")
    print("errors within bounds" if good else "a bound is MISSED")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
