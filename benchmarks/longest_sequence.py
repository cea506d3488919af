"""Tokens against memory, and the longest sequence that trains, by method: none, recomputation, LASP, both.

    python benchmarks/longest_sequence.py                    (CPU processes; about 25 minutes on two cores)
    python benchmarks/longest_sequence.py --device cuda      (one GPU: within 150 seconds; several: a minute a method)
    python benchmarks/longest_sequence.py --plot results/A.json results/B.json --image docs/img/longest-sequence.png

CPU: transnormer-tiny in fp32. Every attempt starts fresh processes whose data segment (heap and anonymous memory) is
limited by the operating system (RLIMIT_DATA), and makes whole training steps: forward, backward, gradient sum, AdamW.
The longest length is found by doubling and bisection, to within 1 %.

One GPU: transnormer-0.4b under bf16 autocast. One GPU is one rank, so LASP's part is not run over several: a rank of
SP=n is measured by giving it the tokens that it would hold, a sequence's length over n. What it would hold besides is
the states of other ranks that the exchange brings, K x V numbers a head and layer, whatever the length; weights are
counted whole, as under DDP.

Several GPUs: `lasp bench train --longest`, in a process a GPU, for one rank and for --sp of them, 2 if not given, under
the same memory; lengths to within 1 %. Weights, gradients and the optimizer's state are spread over the ranks of a
sequence as over any others (--data-parallel). Two ranks have a goal: at least 1.95 times one rank's longest sequence;
if it is missed, the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
# Name, whether the sequence is split, and the recomputation.
METHODS = (("none", False, "none"), ("recomputation", False, "full"), ("LASP", True, "none"), ("both", True, "full"))
# How many times one GPU's longest sequence two must train.
GOAL = 1.95


def worker(tokens: int, limit_mib: int, recomputation: str) -> None:
    """One training step on this rank's share of a sequence, under the limit."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_mib << 20, limit_mib << 20))
    import torch
    import torch.distributed as dist

    from lasp.distributed.mesh import build_mesh
    from lasp.models import CausalLM, preset
    from lasp.parallelize import parallelize

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["MEET"], rank=rank, world_size=size)
    torch.manual_seed(0)
    model = parallelize(
        CausalLM(preset("transnormer", "tiny", vocab_size=257)), build_mesh(sp=size), recomputation=recomputation
    )
    optimizer = torch.optim.AdamW(model.module.parameters())
    text = torch.randint(257, (1, tokens // size + 1))
    # Two steps: from the second on, the optimizer's state is there too.
    for _ in range(2):
        out = model.training(text[:, :-1], labels=text[:, 1:], sp=model.sp)
        model.mean_loss(out.loss_sum, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def peak_mib(tokens: int, size: int, limit_mib: int, recomputation: str) -> int | None:
    """Resident peak of a process where a sequence of `tokens` trains over `size` of them; None where it does not."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", str(tokens), "--limit-mib", str(limit_mib)]
        command += ["--recomputation", recomputation]
        environment = os.environ | {
            "WORLD_SIZE": str(size),
            "MEET": f"file://{folder}/meet",
            "OMP_NUM_THREADS": "1",
            # glibc gives freed tensors back at once, at any size: what counts is what is in use, not fragmentation.
            "MALLOC_MMAP_THRESHOLD_": str(1 << 18),
        }
        workers = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        answers = [process.communicate() for process in workers]
    good = all(process.returncode == 0 for process in workers)
    errors = " ".join(error for _, error in answers)
    if not good and "memory" not in errors.lower() and "MemoryError" not in errors:
        raise RuntimeError(f"failed, but not for want of memory:\n{errors[-3000:]}")
    peak = max(int(out) for out, _ in answers) if good else None
    outcome = f"trains, resident peak {peak} MiB" if good else "out of memory"
    print(f"  SP={size} recomputation {recomputation} {tokens:>8} tokens: {outcome}", flush=True)
    return peak


def longest(size: int, limit_mib: int, unit: int, recomputation: str) -> tuple[int, list[tuple[int, int]]]:
    """The longest sequence in multiples of `unit` tokens, to within 1 %, and (tokens, peak MiB) of all that trained."""
    points = []

    def fits(tokens: int) -> bool:
        peak = peak_mib(tokens, size, limit_mib, recomputation)
        if peak is not None:
            points.append((tokens, peak))
        return peak is not None

    return search(fits, unit), sorted(points)


def search(fits: Callable[[int], bool], unit: int) -> int:
    """The longest multiple of `unit` that fits, to within 1 %, by doubling and bisection; 0 if not even `unit` fits."""
    low, high = 0, unit
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(unit, low // 100):
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def on_cpu(limit_mib: int, sp: int) -> dict[str, Any]:
    """Every method, searched."""
    import torch

    print(f"transnormer-tiny, fp32, batch 1, {limit_mib} MiB per process")
    series = []
    for name, split, recomputation in METHODS:
        # A multiple of the chunk on every rank, so that lengths compare exactly.
        tokens, points = longest(sp if split else 1, limit_mib, 64 * sp, recomputation)
        series.append(
            {
                "method": name,
                "sp": sp if split else 1,
                "recomputation": recomputation,
                "longest_tokens": tokens,
                "points": [{"tokens": n, "peak_bytes": mib << 20} for n, mib in points],
            }
        )
    return {
        "what": "longest trainable sequence under a limit of RLIMIT_DATA per process; peaks are resident memory",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "model": "transnormer-tiny, fp32, batch 1",
        "limit_bytes": limit_mib << 20,
        "limit_is_of_peak": False,  # resident memory holds the libraries too, which are not data
        "series": series,
    }


def on_gpu(sp: int, budget_s: float, size: str) -> dict[str, Any]:
    """Peak memory of one rank at doubling lengths, and once between the last that fits and the first that does not."""
    import torch

    from lasp.bench.steps import BenchTrainConfig, measure
    from lasp.train.config import ModelOptions, ParallelOptions

    began = time.monotonic()
    measured: dict[str, dict[str, Any]] = {}
    for recomputation in ("none", "full"):
        points: list[dict[str, float]] = []
        deadline = began + budget_s * (0.35 if recomputation == "none" else 1.0)
        tokens, fits, step_s, ended = 8192, True, 0.0, "out of memory"
        while True:
            if time.monotonic() + 6 * step_s > deadline:  # two steps of twice the length, and room
                ended = "time"
                break
            config = BenchTrainConfig(
                model=ModelOptions(family="transnormer", size=size),  # type: ignore[arg-type]
                parallel=ParallelOptions(sp=1, recomputation=recomputation),  # type: ignore[arg-type]
                tokens=(tokens,),
                steps=1,
            )
            row = measure(config)["rows"][0]
            gc.collect()
            torch.cuda.empty_cache()
            held = row["step_s"] is not None
            print(f"  recomputation {recomputation} {tokens:>9,} tokens: ", end="")
            print(f"{row['peak_memory_bytes'] / GIB:.1f} GiB, {row['step_s']:.2f} s" if held else "out of memory")
            if held:
                points.append({"tokens": tokens, "peak_bytes": row["peak_memory_bytes"], "step_s": row["step_s"]})
                step_s = row["step_s"]
            if not fits or (not held and len(points) == 0):
                break
            fits = held
            tokens = tokens * 2 if held else tokens // 4 * 3
        measured[recomputation] = {"points": points, "ended": ended}
    series = []
    for name, split, recomputation in METHODS:
        ranks = sp if split else 1
        points = [{**p, "tokens": p["tokens"] * ranks} for p in measured[recomputation]["points"]]
        series.append(
            {
                "method": name,
                "sp": ranks,
                "recomputation": recomputation,
                "longest_tokens": max((p["tokens"] for p in points), default=0),
                "ended": measured[recomputation]["ended"],
                "points": points,
            }
        )
    return {
        "what": "peak memory of one rank's training step; of SP=n a rank's share of the tokens was run on the one GPU",
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": f"transnormer-{size}, bf16 autocast, batch 1",
        "limit_bytes": torch.cuda.get_device_properties(0).total_memory,
        "limit_is_of_peak": True,
        "series": series,
    }


def trained(ranks: int, recomputation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns what `lasp bench train --longest` says of sequences over `ranks` fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "lasp.cli.main", "bench", "train", "--device", "cuda", "--longest"]
        command += ["--tokens", *(str(ranks * tokens) for tokens in options.first_tokens), "--steps", "1"]
        command += ["--model.size", options.size, "--sp", str(ranks), "--recomputation", recomputation]
        command += ["--output", str(output)]
        command += [] if options.memory_gib is None else ["--memory-gib", str(options.memory_gib)]
        command += [] if ranks == 1 else ["--data-parallel", options.data_parallel]
        done = subprocess.run(command, capture_output=True, text=True)
        if not output.exists() or "out of memory" not in (done.stdout + done.stderr).lower():
            raise RuntimeError(f"failed, but not for want of memory:\n{(done.stdout + done.stderr)[-3000:]}")
        figures: dict[str, Any] = json.loads(output.read_text())
    figures["rows"] = [row for row in figures["rows"] if row["step_s"] is not None]
    return figures


def on_gpus(sp: int, options: argparse.Namespace) -> dict[str, Any]:
    """Every method, to the longest of its sequences."""
    figures: dict[str, Any] = {}
    series = []
    for name, split, recomputation in METHODS:
        if name not in options.methods:
            continue
        ranks = sp if split else 1
        figures = trained(ranks, recomputation, options)
        points = [
            {"tokens": row["tokens"], "peak_bytes": row["peak_memory_bytes"], "step_s": row["step_s"]}
            for row in figures["rows"]
        ]
        print(f"  {name}, SP={ranks}: {points[-1]['tokens']:,} tokens", flush=True)
        series.append(
            {"method": name, "sp": ranks, "recomputation": recomputation, "data_parallel": figures["data_parallel"]}
            | {"longest_tokens": points[-1]["tokens"], "points": points}
        )
    return {
        "what": "longest sequence that trains, to within 1 %; every rank is a process with a GPU of its own",
        "machine": figures["device"],
        "torch": figures["torch"],
        "model": f"{figures['model']}, {figures['precision']} autocast, batch 1",
        "limit_bytes": figures["memory_bytes"],
        "limit_is_of_peak": True,
        "series": series,
        "goals": goals(series),
    }


def goals(series: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Goals of two ranks, for each recomputation that was measured on one and on two."""
    found = []
    for two in (each for each in series if each["sp"] == 2):
        for one in (each for each in series if each["sp"] == 1 and each["recomputation"] == two["recomputation"]):
            got = two["longest_tokens"] / max(1, one["longest_tokens"])
            found.append({"method": two["method"], "at_least": GOAL, "got": got, "met": got >= GOAL})
    return found


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{record['model']}, {record['machine']}, {record['limit_bytes'] / GIB:.1f} GiB a process",
        "",
        "| method | longest sequence that trained, tokens | times the first |",
        "|---|---|---|",
    ]
    first = record["series"][0]["longest_tokens"]
    for each in record["series"]:
        name = each["method"] + (f", SP={each['sp']}" if each["sp"] > 1 else "")
        more = " (stopped by time, not memory)" if each.get("ended") == "time" else ""
        lines.append(f"| {name} | {each['longest_tokens']:,}{more} | {each['longest_tokens'] / max(1, first):.2f} |")
    for goal in record.get("goals", []):
        outcome = "met" if goal["met"] else "MISSED"
        lines.append(f"\ngoal, {goal['method']}: at least {goal['at_least']} times, got {goal['got']:.3f}: {outcome}")
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], image: Path) -> None:
    """Peak memory of a process against the length of the sequence, one panel a record."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(records), 4), layout="constrained")
    for panel, record in zip(figure.subplots(1, len(records), squeeze=False)[0], records, strict=True):
        for each in record["series"]:
            label = each["method"] + (f", SP={each['sp']}" if each["sp"] > 1 else "")
            points = each["points"]
            panel.plot([p["tokens"] for p in points], [p["peak_bytes"] / GIB for p in points], marker=".", label=label)
        if record["limit_is_of_peak"]:
            panel.axhline(record["limit_bytes"] / GIB, color="grey", linewidth=0.8, linestyle="--")
        panel.set(xscale="log", xlabel="tokens of the sequence", ylabel="peak memory of a process, GiB")
        panel.set_title(f"{record['model']}\n{record['machine']}", fontsize=9)
        panel.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(image, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit-mib", type=int, default=1536, help="CPU: memory of one process")
    parser.add_argument("--sp", type=int, help="processes of a sequence (CPU: 4, one GPU: 8, several: 2)")
    parser.add_argument("--size", default="0.4b", help="GPU: size of the transnormer preset")
    parser.add_argument("--budget-s", type=float, default=140.0, help="one GPU: stop after so long")
    parser.add_argument("--memory-gib", type=float, help="several GPUs: of each, no more than this")
    parser.add_argument("--methods", nargs="+", choices=[name for name, *_ in METHODS], default=["none", "LASP"])
    parser.add_argument(
        "--first-tokens", type=int, nargs=2, default=(8192, 16384), help="several GPUs: lengths a rank to begin with"
    )
    parser.add_argument("--data-parallel", default="zero2", help="several GPUs: what a rank keeps of the weights")
    parser.add_argument("--output", type=Path, help="JSON file, or a folder for it; default: benchmarks/results")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="JSON", help="measure nothing, draw these")
    parser.add_argument("--image", type=Path, default=Path("docs/img/longest-sequence.png"))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--recomputation", default="none", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker, arguments.limit_mib, arguments.recomputation)
        return 0
    if arguments.plot:
        records = [json.loads(path.read_text()) for path in arguments.plot]
        plot(records, arguments.image)
        print("\n\n".join(map(table, records)))
        return 0
    if arguments.device == "cpu":
        figures = on_cpu(arguments.limit_mib, arguments.sp or 4)
    elif num_gpus() > 1:
        figures = on_gpus(arguments.sp or 2, arguments)
    else:
        figures = on_gpu(arguments.sp or 8, arguments.budget_s, arguments.size)
    record = {"date": datetime.date.today().isoformat(), "python": platform.python_version(), **figures}
    where = "cpu" if arguments.device == "cpu" else record["machine"].lower().replace(" ", "-")
    name = f"{record['date']}-{where}-longest-sequence-methods.json"
    path = arguments.output or RESULTS / name
    path = path / name if path.is_dir() else path
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(record)}\n\nwritten to {path}")
    return int(any(not goal["met"] for goal in record.get("goals", [])))


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    raise SystemExit(main())
