"""Tokens against memory, and the longest sequence that trains, by method: none, recomputation, LASP, both.

    python benchmarks/longest_sequence.py                    (CPU processes; about 25 minutes on two cores)
    python benchmarks/longest_sequence.py --device cuda      (one GPU; within 150 seconds)
    python benchmarks/longest_sequence.py --plot results/A.json results/B.json --image docs/img/longest-sequence.png

CPU: transnormer-tiny in fp32. Every attempt starts fresh processes whose data segment (heap and anonymous memory) is
limited by the operating system (RLIMIT_DATA), and makes whole training steps: forward, backward, gradient sum, AdamW.
The longest length is found by doubling and bisection, to within 1 %.

One GPU: transnormer-0.4b under bf16 autocast. One GPU is one rank, so LASP's part is not run over several: a rank of
SP=n is measured by giving it the tokens that it would hold, a sequence's length over n. What it would hold besides is
the states of other ranks that the exchange brings, K x V numbers a head and layer, whatever the length; weights are
counted whole, as under DDP.
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
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
# Name, whether the sequence is split, and the recomputation.
METHODS = (("none", False, "none"), ("recomputation", False, "full"), ("LASP", True, "none"), ("both", True, "full"))


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

    low, high = 0, unit
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(unit, low // 100):
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, sorted(points)


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

    from lasp.cli.bench_train import BenchTrainConfig, measure
    from lasp.train.config import ModelOptions

    began, measured = time.monotonic(), {}
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
                tokens=(tokens,),
                recomputation=recomputation,  # type: ignore[arg-type]
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


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit-mib", type=int, default=1536, help="CPU: memory of one process")
    parser.add_argument("--sp", type=int, help="processes of a sequence (CPU: 4, GPU: 8)")
    parser.add_argument("--size", default="0.4b", help="GPU: size of the transnormer preset")
    parser.add_argument("--budget-s", type=float, default=140.0, help="GPU: stop to begin attempts after so long")
    parser.add_argument("--output", type=Path, help="JSON file; default: a new one in benchmarks/results")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="JSON", help="measure nothing, draw these")
    parser.add_argument("--image", type=Path, default=Path("docs/img/longest-sequence.png"))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--recomputation", default="none", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker, arguments.limit_mib, arguments.recomputation)
        return
    if arguments.plot:
        records = [json.loads(path.read_text()) for path in arguments.plot]
        plot(records, arguments.image)
        print("\n\n".join(map(table, records)))
        return
    if arguments.device == "cpu":
        figures = on_cpu(arguments.limit_mib, arguments.sp or 4)
    else:
        figures = on_gpu(arguments.sp or 8, arguments.budget_s, arguments.size)
    record = {"date": datetime.date.today().isoformat(), "python": platform.python_version(), **figures}
    where = "cpu" if arguments.device == "cpu" else record["machine"].lower().replace(" ", "-")
    path = arguments.output or RESULTS / f"{record['date']}-{where}-longest-sequence-methods.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(record)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
