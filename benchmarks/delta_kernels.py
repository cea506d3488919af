"""Speed, extra memory, host cost and errors of the delta rule's kernels, in one run on one GPU, also beside peers.

    python benchmarks/delta_kernels.py --output benchmarks/results
    python benchmarks/delta_kernels.py --peers flashqla fla          # what to install: baselines/delta.py, kernels.py

For shapes that `benchmarks/kernels.py` has not (grouped heads, packed documents), and launch by launch. Times are
medians of replays of CUDA graphs, kernels alone; extra memory is what forward and backward need beyond inputs, outputs
and gradients; host times are of eager calls at T = 256, where the GPU is not waited for. `--report` prints the tables
of docs/results/delta-rules.md from files instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from kernels import (
    DELTA_CASES,
    DELTA_KINDS,
    cold_start_seconds,
    delta_inputs,
    errors,
    fla_delta,
    flashqla,
    graph_milliseconds,
    milliseconds,
    ours,
    peak_bytes,
)
from outputs import folder
from torch import Tensor
from torch.nn.functional import normalize

import lasp
from lasp.kernels.triton.common.launch import BoundKernel

DIM, HOST_TOKENS, ROUNDS, CALLS = 128, 256, 15, 20


class Shape(NamedTuple):
    kind: str
    tokens: int
    heads: int = 16
    value_heads: int = 16
    documents: int = 1
    strongest: float = 0.1  # log-decay; the mean is half of it
    goal: tuple[float, float] | None = None  # forward and both, ms
    key_dim: int = DIM
    value_dim: int = DIM
    parts: bool = False  # whether it is measured launch by launch too


SHAPES = (
    Shape("gated delta", 32768, goal=(0.40, 1.6)),
    Shape("gated delta", 32768, value_heads=32, goal=(0.85, 3.0)),
    Shape("gated delta", 8192, goal=(0.17, 0.6)),
    Shape("delta", 65536, goal=(0.9, 3.0), parts=True),
    Shape("gated delta", 65536, parts=True),
    Shape("kda", 65536, strongest=0.04, goal=(1.8, 5.0), parts=True),
    Shape("gated delta", 32768, value_heads=32, documents=4, goal=(0.6, 2.6)),
    *(
        Shape(kind, 65536, heads=4, value_heads=4, strongest=strongest)
        for kind, strongest in (("delta", 0.1), ("gated delta", 0.1), ("kda", 0.04))
    ),
    # Gates that no chunk bounds; the heads of gated-deltanet-1b.
    Shape("kda", 65536, strongest=12.0, parts=True),
    Shape("gated delta", 32768, heads=6, value_heads=6, key_dim=256, value_dim=512, parts=True),
)


Rule = Callable[[dict[str, Tensor], Sequence[int] | None], Tensor]


def fused(x: dict[str, Tensor], bounds: Sequence[int] | None) -> Tensor:
    return lasp.delta_rule(x["q"], x["k"], x["v"], x["beta"], x.get("g"), cu_seqlens=bounds, backend="triton")[0]


def fla(x: dict[str, Tensor], bounds: Sequence[int] | None) -> Tensor:
    if bounds is not None:
        raise ValueError("packed documents of flash-linear-attention are not measured")
    return fla_delta(x)


PEERS: dict[str, Rule] = {"flashqla": flashqla, "fla": fla}


class Problem(NamedTuple):
    x: dict[str, Tensor]
    bounds: tuple[int, ...] | None
    rule: Rule = fused

    def forward(self) -> Tensor:
        return self.rule(self.x, self.bounds)

    def forward_alone(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def both(self) -> tuple[Tensor, ...]:
        wanted = [tensor for tensor in self.x.values() if tensor.requires_grad]
        o = self.forward()
        return o.detach(), *torch.autograd.grad(o, wanted, self.x["d_o"])


def problem(shape: Shape) -> Problem:
    x = delta_inputs((1, shape.tokens, shape.value_heads, shape.value_dim), shape.kind, strongest=shape.strongest)
    for name in ("q", "k"):
        tensor = x[name].detach()[:, :, : shape.heads, : shape.key_dim]
        if shape.key_dim < shape.value_dim:
            tensor = normalize(tensor.float(), dim=-1).to(tensor.dtype)
        x[name] = tensor.contiguous().requires_grad_()
    each = shape.tokens // shape.documents
    bounds = tuple(range(0, shape.tokens + 1, each)) if shape.documents > 1 else None
    return Problem(x, bounds)


def launches(p: Problem) -> list[dict[str, Any]]:
    """Each launch of a forward and backward pass: its kernel, programs and milliseconds."""
    found: list[tuple[BoundKernel, dict[str, Tensor | None]]] = []
    run, hook = BoundKernel.run, triton.knobs.runtime.launch_enter_hook

    def record(launch: BoundKernel, tensors: dict[str, Tensor | None]) -> None:
        run(launch, tensors)
        found.append((launch, tensors))

    def watch(metadata: object) -> None:
        """Has every launch run as the first does."""

    with patch.object(BoundKernel, "run", record):
        hook.add(watch)
        p.both()
        hook.remove(watch)
    rows = []
    for launch, tensors in found:
        times = graph_milliseconds(partial(launch.run, tensors))
        rows.append({"kernel": launch.kernel.__name__, "grid": launch.grid, "ms": times["median"]})
    return rows


def extra_bytes(p: Problem) -> int:
    """Beyond inputs, outputs and gradients."""
    results = p.both()
    size = sum(tensor.numel() * tensor.element_size() for tensor in results)
    del results
    return peak_bytes(p.both) - size


def host_milliseconds(call: Callable[[], Any]) -> float:
    for _ in range(10):
        call()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(1e3 * (time.perf_counter() - start) / CALLS)
    torch.cuda.synchronize()
    return statistics.median(times)


def host(kind: str) -> dict[str, float]:
    """Host times, on one thread too: autograd's hand-over to its own is paid once by a whole model, not a layer."""
    p = problem(Shape(kind, HOST_TOKENS))
    found = {"forward": host_milliseconds(p.forward), "both": host_milliseconds(p.both)}
    with torch.autograd.set_multithreading_enabled(False):
        found["both on one thread"] = host_milliseconds(p.both)
    return found


def measured(shape: Shape) -> dict[str, Any]:
    p = problem(shape)
    row: dict[str, Any] = shape._asdict() | {"extra_gib": extra_bytes(p) / 2**30}
    row["forward"], row["both"] = graph_milliseconds(p.forward_alone), graph_milliseconds(p.both)
    return row | ({"launches": launches(p)} if shape.parts else {})


def peer(shape: Shape, name: str) -> dict[str, Any]:
    """A peer on the same tensors: by CUDA graphs where they can be captured, else eager. Refusing is a result too."""
    p = problem(shape)._replace(rule=PEERS[name])
    row: dict[str, Any] = {"peer": name}
    try:
        ours = problem(shape).both()
        row["farthest_from_ours"] = max(
            ((theirs.float() - own.float()).norm() / own.float().norm()).item()
            for theirs, own in zip(p.both(), ours, strict=True)
        )
        del ours
        row["extra_gib"] = extra_bytes(p) / 2**30
        for part, call in (("forward", p.forward_alone), ("both", p.both)):
            row[part] = milliseconds(call) | {"launch": "eager"}
            try:
                row[part] = graph_milliseconds(call) | {"launch": "graph"}
            except RuntimeError as error:
                row[part]["no_graph"] = str(error)[:120]
    except Exception as error:  # compilers of kernels have classes of their own
        row["refused"] = " ".join(str(error).split())[:200]
    return row


def joined(result: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """Returns a file with the peers that others have for shapes of its own."""
    for row in result["rows"]:
        for other in others:
            same = [found for found in other["rows"] if all(found[name] == row[name] for name in Shape._fields)]
            row["peers"] = [*row.get("peers", []), *(each for found in same for each in found.get("peers", []))]
    return result


def tables(result: dict[str, Any]) -> str:
    lines = [
        f"{result['device']}, PyTorch {result['torch']}, Triton {result['triton']}, bf16, K = V = {DIM} if not said.",
        "",
        "| recurrence | T, heads of q and k / of v, documents | forward ms (goal) | both ms (goal) | extra GiB |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        goals = ["" if row["goal"] is None else f" ({goal:g})" for goal in row["goal"] or (0, 0)]
        times = (f"{row[part]['median']:.3f}{goal}" for part, goal in zip(("forward", "both"), goals, strict=True))
        lines.append(f"| {row['kind']} | {_size(row)} | {' | '.join(times)} | {row['extra_gib']:.2f} |")
        for found in row.get("peers", []):
            if "refused" in found:
                lines.append(f"| by {found['peer']} | | refused: {found['refused'][:60]} | | |")
                continue
            times = (f"{found[part]['median']:.3f} ({found[part]['launch']})" for part in ("forward", "both"))
            lines.append(f"| by {found['peer']} | | {' | '.join(times)} | {found['extra_gib']:.2f} |")
    for row in result["rows"]:
        if "launches" in row:
            parts = (f"{each['kernel'].removesuffix('_kernel')} {each['ms']:.3f}" for each in row["launches"])
            lines += ["", f"{row['kind']}, {_size(row)}, launch by launch, ms: {', '.join(parts)}."]
    # A run that was cut off has the first of these.
    for label, figures in (
        (f"Host ms of an eager call, T = {HOST_TOKENS}", "host_ms"),
        ("Cold start, s", "cold_start_s"),
    ):
        if figures in result:
            lines += [
                "",
                f"{label}: {'; '.join(f'{kind} {_figures(each)}' for kind, each in result[figures].items())}.",
            ]
    if "errors" in result:
        names = ("o", "dq", "dk", "dv", "dbeta", "dg")
        lines += ["", f"| errors against fp64, T = 4096 | keys | {' | '.join(names)} |"]
        lines.append("|---" * (len(names) + 2) + "|")
        for kind, cases in result["errors"].items():
            for case, found in cases.items():
                cells = (f"{found[name]:.1e}" if name in found else "" for name in names)
                lines.append(f"| {kind} | {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(row: dict[str, Any]) -> str:
    """Returns what tells a row from others of its kind."""
    said = [f"{row['tokens']}", f"{row['heads']}/{row['value_heads']}", f"{row['documents']}"]
    if (row["key_dim"], row["value_dim"]) != (DIM, DIM):
        said.append(f"K = {row['key_dim']}, V = {row['value_dim']}")
    if row["strongest"] > 1:
        said.append(f"gates to -{row['strongest']:g}")
    return ", ".join(said)


def _figures(each: float | dict[str, float]) -> str:
    """One figure, or several with their names."""
    return ", ".join(f"{name} {ms:.2f}" for name, ms in each.items()) if isinstance(each, dict) else f"{each:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=folder, default=Path(__file__).parent / "results")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="the peers of the others go to its rows")
    parser.add_argument("--kinds", nargs="*", choices=DELTA_KINDS, default=list(DELTA_KINDS))
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=[])
    parser.add_argument("--only-speed", action="store_true", help="no host times, errors or cold starts")
    options = parser.parse_args()
    if options.report is not None:
        print(tables(joined(*(json.loads(path.read_text()) for path in options.report))))
        return

    import triton

    device = torch.cuda.get_device_name()
    result: dict[str, Any] = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "rows": []}
    path = options.output / f"delta-kernels-{device.replace(' ', '-').lower()}.json"
    for shape in (shape for shape in SHAPES if shape.kind in options.kinds):
        result["rows"].append(measured(shape))
        for name in options.peers:
            result["rows"][-1].setdefault("peers", []).append(peer(shape, name))
        path.write_text(json.dumps(result, indent=1))
    if options.only_speed:
        print(tables(result))
        return
    result["host_ms"] = {kind: host(kind) for kind in options.kinds}
    path.write_text(json.dumps(result, indent=1))
    result["errors"] = {kind: {case: errors(kind, ours, case=case) for case in DELTA_CASES} for kind in options.kinds}
    path.write_text(json.dumps(result, indent=1))
    result["cold_start_s"] = {kind: cold_start_seconds("lasp", kind) for kind in options.kinds}
    path.write_text(json.dumps(result, indent=1))
    print(tables(result))


if __name__ == "__main__":
    main()
