"""Kernel fusion and the state cache, each with and without: time and memory of attention forward and backward.

    python -m benchmarks.ablation --output benchmarks/results      (one GPU, about a minute)
    python -m benchmarks.ablation --tiny                           (no GPU: the kernels in Triton's interpreter)
    python -m benchmarks.ablation --table RESULT.json              (the documentation's table of a kept result)

Fused: the Triton kernels, which hold scores and the states inside a segment in registers. Separate products: the
same algorithm, each product, mask and scan a PyTorch kernel of its own (`benchmarks/unfused.py`). PyTorch backend:
`backend="torch"`, in fp32, which is written for exactness.
Cached: backward reads the states that forward kept (LASP's state cache). Recomputed: forward keeps none; backward
summarizes and scans again first. Over several ranks it would also exchange the states again, once a layer, which one
device does not show; `lasp.exchange.cost` says what that costs.

Each variant's outputs and gradients are compared with fp64 at a short length first. Medians; memory beyond the inputs:
"kept" from forward to backward, outputs left out, and the peak.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks import unfused
from lasp.kernels.torch.decay import STAGES as torch_stages
from lasp.kernels.triton.decay.scalar.stages import ScalarSegments
from lasp.kernels.triton.decay.stages import STAGES as triton_stages
from lasp.recurrence.inputs import DecayInputs, state_dtype, state_shape
from lasp.recurrence.stages import AnyStages

KINDS = ("constant", "scalar")
SLOWEST_DECAY = 0.02
QUICK_S = 0.01
# Largest relative errors against fp64 of outputs and gradients (bf16 inputs, fp32 in --tiny); of a gate's gradient,
# which some variants form from rounded ones, three times that.
BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


class Variant(NamedTuple):
    """One way to compute.

    Attributes:
        forward: of a run, o and the states that backward needs.
        states: those states alone, again.
        backward: of a run, the states and d_o, the gradients.
    """

    forward: Callable[[DecayInputs], tuple[Tensor, Any]]
    states: Callable[[DecayInputs], Any]
    backward: Callable[[DecayInputs, Any, Tensor], tuple[Tensor | None, ...]]


def _zero(x: DecayInputs) -> Tensor:
    return x.q.new_zeros(state_shape(x), dtype=state_dtype(x.q.dtype))


def _staged(stages: AnyStages, states: Callable[[DecayInputs], Any]) -> Variant:
    def forward(given: DecayInputs) -> tuple[Tensor, Any]:
        x = stages.prepare(given, False)
        _, totals = stages.summarize(x)
        o, saved = stages.outputs(x, totals, stages.local_outputs(x, totals), _zero(given))
        return o, saved

    def backward(given: DecayInputs, saved: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        x = stages.prepare(given, False)
        _, totals = stages.summarize_adjoint(x, saved, d_o)
        local = stages.local_gradients(x, saved, totals, d_o)
        return stages.gradients(x, saved, totals, local, d_o, _zero(given))

    return Variant(forward, states, backward)


def _triton_states(x: DecayInputs) -> Any:
    """Returns states as the sweeps of `outputs` would keep them, from the scan over segments: no state enters it."""
    summary, totals = triton_stages.summarize(triton_stages.prepare(x, False))
    assert isinstance(totals, ScalarSegments)
    return (summary.state, totals.states, *totals.gates)


def _torch_states(x: DecayInputs) -> Any:
    _, (chunks, runs) = torch_stages.summarize(x)
    return (chunks.chunking.scan(runs, _zero(x))[0],)


VARIANTS = {
    "fused": _staged(triton_stages, _triton_states),
    "separate products": Variant(unfused.forward, unfused.states, unfused.backward),
    "PyTorch backend": _staged(torch_stages, _torch_states),
}


def problem(tokens: int, kind: str, options: argparse.Namespace) -> tuple[DecayInputs, Tensor]:
    """A run, and the gradient of its outputs."""
    random = torch.Generator(options.device).manual_seed(0)

    def normal() -> Tensor:
        shape = (options.batch, tokens, options.heads, options.dim)
        return torch.randn(shape, device=options.device, generator=random).to(options.dtype)

    q, k, v, d_o = (normal() for _ in range(4))
    shape = (options.heads,) if kind == "constant" else (options.batch, tokens, options.heads)
    g = -SLOWEST_DECAY * torch.rand(shape, device=options.device, generator=random)
    # Whether the decay's gradient is wanted is read from the tensor.
    return DecayInputs(q, k, v, g.requires_grad_(kind == "scalar"), options.dim**-0.5), d_o


def step(variant: Variant, x: DecayInputs, d_o: Tensor, cached: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    o, saved = variant.forward(x)
    if not cached:
        del saved
        saved = variant.states(x)
    return o, variant.backward(x, saved, d_o)


def errors(variant: Variant, cached: bool, kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Relative, against the PyTorch backend in fp64, at a short length; a constant decay has no gradient."""
    x, d_o = problem(options.check_tokens, kind, options)
    wide = x._replace(**{name: getattr(x, name).detach().double() for name in "qkvg"})
    assert wide.g is not None
    wide = wide._replace(g=wide.g.requires_grad_(kind == "scalar"))
    expected_o, expected = step(VARIANTS["PyTorch backend"], wide, d_o.double(), True)
    o, gradients = step(variant, x, d_o, cached)
    names = ("o", "d_q", "d_k", "d_v", "d_g")[: 5 if kind == "scalar" else 4]
    pairs = zip(names, (o, *gradients), (expected_o, *expected), strict=False)
    found = {}
    for name, got, want in pairs:
        assert got is not None and want is not None
        found[name] = ((got.double() - want).norm() / want.norm()).item()
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any], options: argparse.Namespace) -> list[float]:
    """Times a call, by repetition; quick calls are queued, five at a time. The first compiles and is not counted."""

    def seconds(calls: int) -> float:
        _wait(options.device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        _wait(options.device)
        return (time.perf_counter() - start) / calls

    seconds(1)
    calls = 5 if options.device == "cuda" and seconds(1) < QUICK_S else 1
    return [1e3 * seconds(calls) for _ in range(options.repetitions)]


def measure(variant: Variant, cached: bool, tokens: int, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    x, d_o = problem(tokens, kind, options)
    forward = milliseconds(lambda: variant.forward(x), options)
    both = milliseconds(lambda: step(variant, x, d_o, cached), options)
    found: dict[str, Any] = {
        "forward_ms": statistics.median(forward),
        "step_ms": statistics.median(both),
        "step_ms_all": both,
    }
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        o, saved = variant.forward(x)
        if not cached:
            del saved
        kept = torch.cuda.memory_allocated() - before - o.nbytes
        saved = saved if cached else variant.states(x)
        variant.backward(x, saved, d_o)
        found |= {"kept_bytes": kept, "peak_bytes": torch.cuda.max_memory_allocated() - before}
    return found


def table(record: dict[str, Any]) -> str:
    """Markdown, every time beside that of fused and cached."""
    lines = [
        "| decay | tokens | | states | forward ms | forward + backward ms | of fused, cached | kept MiB | peak MiB |"
    ]
    lines.append("|---" * 9 + "|")
    for row in record["rows"]:
        base = next(
            other["step_ms"]
            for other in record["rows"]
            if (other["kind"], other["tokens"], other["variant"], other["cached"])
            == (row["kind"], row["tokens"], "fused", True)
        )
        # Recomputed, forward is the same call.
        forward = f"{row['forward_ms']:.3g}" if row["cached"] else ""
        kept, peak = (f"{row[name] / (1 << 20):,.0f}" if name in row else "-" for name in ("kept_bytes", "peak_bytes"))
        lines.append(
            f"| {row['kind']} | {row['tokens']:,} | {row['variant']} | {'cached' if row['cached'] else 'recomputed'} | "
            f"{forward} | {row['step_ms']:.3g} | {row['step_ms'] / base:.2f} | {kept} | {peak} |"
        )
    return "\n".join(lines)


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    rows, good = [], True
    for kind in KINDS:
        for name, variant in VARIANTS.items():
            for cached in (True, False):
                found = errors(variant, cached, kind, options)
                for tensor, error in found.items():
                    if not error < BOUNDS[options.dtype] * (3 if tensor == "d_g" else 1):
                        good = False
                        print(f"{kind}, {name}, {'cached' if cached else 'recomputed'}: {tensor} {error:.1e} MISSED")
                for tokens in options.tokens:
                    row = {"kind": kind, "tokens": tokens, "variant": name, "cached": cached, "errors": found}
                    rows.append(row | measure(variant, cached, tokens, kind, options))
    rows.sort(key=lambda row: (row["kind"], row["tokens"]))
    return {
        "what": "linear attention forward and backward: fused or not, states cached or recomputed",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "options": {name: str(value) for name, value in vars(options).items()},
        "rows": rows,
        "good": good,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, fp32: does the script run?")
    parser.add_argument("--table", type=Path, help="print the table of this result, and measure nothing")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128, help="K and V")
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    if options.table is not None:
        print(table(json.loads(options.table.read_text())))
        return 0
    options.device, options.dtype, options.check_tokens = "cuda", torch.bfloat16, 2048
    if options.tiny:
        options.device, options.dtype, options.check_tokens = "cpu", torch.float32, 512
        options.tokens, options.heads, options.dim, options.repetitions = [256], 1, 16, 1
    record = run(options)
    print(table(record))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"{record['date']}-{record['device'].lower().replace(' ', '-')}-ablation.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {path}")
    return 0 if record["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
