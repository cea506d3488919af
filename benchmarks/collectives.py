"""Latency and bandwidth of what exchanges are made of.

    torchrun --nproc-per-node 2 -m benchmarks.collectives --output FOLDER       (one process a GPU)
    python -m benchmarks.collectives --repetitions 2 --output FOLDER            (two gloo processes: checks the script)

The operations are those of `lasp bench exchange`, for more sizes. Writes all times, and beside them the constants
that fit, for lasp.exchange.Auto(Constants.load(path)).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.processes import run
from lasp.distributed.comm import Comm
from lasp.exchange.measure import PROBES, operations
from lasp.train.config import ParallelOptions, TrainConfig
from lasp.train.world import join, leave

RESULTS = Path(__file__).parent / "results"
SIZES = tuple(64 << 10 + 2 * power for power in range(5))  # to 16 MiB


def table(record: dict[str, Any]) -> str:
    """Markdown: microseconds by size, and what fits them."""
    sizes = sorted({row["bytes"] for row in record["rows"]})
    shown = " | ".join(f"{nbytes >> 10} KiB" for nbytes in sizes)
    lines = [f"{record['ranks']} ranks over {record['backend']}, {record['where']}; microseconds, medians", ""]
    lines += [f"| operation | {shown} | latency, us | GB/s |", "|---" * (len(sizes) + 3) + "|"]
    for name, link in record["links"].items():
        times = {row["bytes"]: row["s"] for row in record["rows"] if row["operation"] == name}
        cells = " | ".join(f"{1e6 * times[nbytes]:.1f}" for nbytes in sizes)
        lines.append(f"| {name} | {cells} | {1e6 * link['latency_s']:.1f} | {link['bytes_per_s'] / 1e9:.1f} |")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> int:
    """Measures in each of the processes; the first prints and writes."""
    size = int(os.environ.get("WORLD_SIZE", "0")) or dist.get_world_size()
    layout = ParallelOptions(sp=size, timeout_s=300.0)
    world = join(TrainConfig(device=options.device, seq_len=size, parallel=layout))
    assert world.mesh is not None
    comm, is_cuda = Comm(world.mesh["sp"].get_group(), 300.0), world.device.type == "cuda"
    sizes = (PROBES[0], *options.sizes)
    found = operations(comm, world.device, sizes=sizes, repetitions=options.repetitions)
    where = torch.cuda.get_device_name(world.device) if is_cuda else f"CPU, {os.cpu_count()} cores"
    record = {
        "what": "elementary operations of exchanges; bytes are those that a rank receives, times of the slowest rank",
        "date": datetime.date.today().isoformat(),
        "where": where,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": comm.size,
        "backend": comm.backend,
        "repetitions": options.repetitions,
        "rows": [
            {"operation": name, "bytes": nbytes, "s": timing.median, "quartiles_s": timing[1:]}
            for name, timings_of in found.times.items()
            for nbytes, timing in zip(sizes, timings_of, strict=True)
        ],
        "links": {name: link._asdict() for name, link in found.links().items()},
    }
    if world.is_first:
        slug = where.lower().replace(" ", "-") if is_cuda else "cpu"
        path = options.output / f"{record['date']}-{slug}-collectives-{comm.size}-ranks.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        constants = path.with_name(path.name.replace("-collectives-", "-constants-"))
        found.constants().save(constants)
        print(f"{table(record)}\n\nwritten to {path} and {constants}")
    leave(world)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes; 4 KiB is measured besides")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        return measure(options)
    options.device = "cpu"
    return int(run(2, lambda rank: measure(options))[0])


if __name__ == "__main__":
    raise SystemExit(main())
