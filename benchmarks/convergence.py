"""Does splitting sequences change what is learned? The paper's convergence table, scaled down.

    python benchmarks/convergence.py                          (about 15 minutes on two cores)
    python benchmarks/convergence.py --table results/A.json   (the table of a result)

Two models, six ways to spread the weights, each without LASP (4 processes with sequences of their own) and with it
(2 x 2: every sequence over two processes): 24 runs of `lasp train`'s loop on the same text, weights and order of
sequences. Beside them the first row without LASP with other seeds: their spread is what a difference must be compared
with.

The paper's table has Legacy DDP and FSDP besides DDP and ZeRO-1, 2, 3. PyTorch has one DDP now: in Legacy DDP's place
stands DDP with every step in two accumulated parts. FSDP2 with its weights resharded is ZeRO-3: in FSDP's place stands
hybrid sharding, two copies of the weights, each spread over two processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import run

RESULTS = Path(__file__).parent / "results"
FAMILIES = ("transnormer", "linear-transformer")
SHAPE = {"d_model": 64, "num_layers": 2, "num_heads": 4, "key_dim": 16, "value_dim": 16, "ffn_dim": 176}
# Name, settings of ParallelOptions, accumulated parts.
ROWS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("DDP", {"data_parallel": "ddp"}, 1),
    ("DDP, accumulated", {"data_parallel": "ddp"}, 2),
    ("hybrid shard", {"data_parallel": "zero3", "dp_replicate": 2}, 1),
    ("ZeRO-1", {"data_parallel": "zero1"}, 1),
    ("ZeRO-2", {"data_parallel": "zero2"}, 1),
    ("ZeRO-3", {"data_parallel": "zero3"}, 1),
)
PROCESSES, SP, LAST = 4, 2, 20


def train(family: str, settings: dict[str, Any], accumulation: int, sp: int, seed: int, steps: int) -> dict[str, Any]:
    """One run: its losses and its score on held-out text."""
    from lasp.train import trainer
    from lasp.train.config import (
        DataOptions,
        ModelOptions,
        OptimizerOptions,
        ParallelOptions,
        SampleOptions,
        TrainConfig,
    )
    from lasp.train.logging.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=ModelOptions(family=family, overrides=SHAPE),  # type: ignore[arg-type]
            data=DataOptions(path=Path(asyncio.__file__).parent, validation_fraction=0.1),
            optimizer=OptimizerOptions(lr=4e-3, warmup_steps=20),
            parallel=ParallelOptions(sp=sp, **settings),
            sample=SampleOptions(num_tokens=0),
            steps=steps,
            seq_len=256,
            global_batch=8,
            accumulation=accumulation,
            seed=seed,
            device="cpu",
            eval_every=steps,
            eval_sequences=64,
            save_every=steps,
            run_dir=Path(folder) / "run",
        )

        def process(_rank: int) -> float | None:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                return trainer.train(config).bits_per_byte

        bits = run(PROCESSES, process)[0]
        lines = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    return {"losses": losses, "final_loss": statistics.mean(losses[-LAST:]), "validation_bits_per_byte": bits}


def measure(steps: int, seeds: int, families: tuple[str, ...] = FAMILIES) -> list[dict[str, Any]]:
    runs = []

    def add(family: str, row: tuple[str, dict[str, Any], int], sp: int, seed: int) -> None:
        began = time.monotonic()
        name, settings, accumulation = row
        result = train(family, settings, accumulation, sp, seed, steps)
        runs.append({"family": family, "row": name, "sp": sp, "dp": PROCESSES // sp, "seed": seed, **result})
        took = time.monotonic() - began
        print(f"  {family}, {name}, SP={sp}, seed {seed}: {result['final_loss']:.5f} ({took:.0f} s)", flush=True)

    for family in families:
        for row in ROWS:
            for sp in (1, SP):
                add(family, row, sp, 0)
        for seed in range(1, seeds):
            add(family, ROWS[0], 1, seed)
    return runs


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"| model | weights | final loss, SP=1 | final loss, SP={SP} | difference | seeds' spread |",
        "|---|---|---|---|---|---|",
    ]
    for family in dict.fromkeys(each["family"] for each in record["runs"]):
        own = [each for each in record["runs"] if each["family"] == family]
        seeds = [each["final_loss"] for each in own if each["row"] == ROWS[0][0] and each["sp"] == 1]
        spread = f"{max(seeds) - min(seeds):.4f} over {len(seeds)}"
        for name, *_ in ROWS:
            without, split = (
                next(e["final_loss"] for e in own if (e["row"], e["sp"], e["seed"]) == (name, sp, 0)) for sp in (1, SP)
            )
            lines.append(f"| {family} | {name} | {without:.5f} | {split:.5f} | {split - without:+.1e} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="of the first row without LASP")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--table", type=Path, metavar="JSON", help="train nothing, print the table of this")
    arguments = parser.parse_args()
    if arguments.output is not None and arguments.output.is_dir():
        parser.error(f"--output is the JSON file to write, but {arguments.output} is a folder")
    if arguments.steps < LAST or arguments.seeds < 2:
        parser.error(f"--steps must be at least {LAST} and --seeds at least 2")
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text())))
        return
    import matplotlib.figure  # noqa: F401 - inherited by the forked processes, which each draw a curve
    import torch

    import lasp.train.trainer  # noqa: F401 - inherited as well

    torch.set_num_threads(1)
    record = {
        "what": "final training loss (mean of the last steps, nats per token) with and without sequence parallelism",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": SHAPE,
        "text": "the Python standard library's asyncio",
        "steps": arguments.steps,
        "last_steps": LAST,
        "processes": PROCESSES,
        "rows": {name: {**settings, "accumulation": parts} for name, settings, parts in ROWS},
        "runs": measure(arguments.steps, arguments.seeds),
    }
    path = arguments.output or RESULTS / f"{record['date']}-cpu-convergence.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(record)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
