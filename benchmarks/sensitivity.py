"""Measures how far apart two runs are that begin one rounding apart: no layout of processes can do better.

    python benchmarks/sensitivity.py                                      (about 10 minutes on two cores)
    python benchmarks/sensitivity.py --families retnet --lr 1e-3 --set norm_eps=1e-2
    python benchmarks/sensitivity.py --table results/A.json

Every tiny preset is trained twice in one process by `lasp train`'s optimizer and learning rates, on the same text in
the same order; in the second run every weight of one matrix is moved by one last bit of fp32. Sums in another order,
which is all that another number of processes changes, move every number so. The losses' largest relative difference
is printed, and the gradient's largest norm before it is clipped.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from lasp.models import NAMES, CausalLM, preset
from lasp.parallelize import parallelize
from lasp.train.config import OptimizerOptions
from lasp.train.optimizer import build_optimizer, clip, learning_rate


def text() -> torch.Tensor:
    """Bytes of Python's asyncio, as token ids."""
    files = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def train(
    family: str, moved: bool, seed: int, steps: int, options: OptimizerOptions, settings: dict[str, Any]
) -> tuple[list[float], float]:
    """The loss of every step, and the largest norm of a gradient."""
    model = CausalLM(preset(family, "tiny", **settings))
    model.init_weights(torch.Generator().manual_seed(seed))
    if moved:
        weight = next(
            p for name, p in model.named_parameters() if name.startswith("blocks.0.attention.") and p.dim() > 1
        )
        with torch.no_grad():
            weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    parallel = parallelize(model, None)
    optimizer = build_optimizer(parallel, options)
    tokens, random = text(), torch.Generator().manual_seed(seed)
    losses, largest = [], 0.0
    for step in range(steps):
        starts = torch.randint(len(tokens) - 257, (4,), generator=random)
        rows = torch.stack([tokens[start : start + 257] for start in starts.tolist()])
        loss = model(rows[:, :-1], labels=rows[:, 1:].contiguous()).loss_sum / rows[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        largest = max(largest, float(clip(parallel, optimizer, options.clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 700, options)
        optimizer.step()
        losses.append(loss.item())
    return losses, largest


def measure(family: str, seed: int, steps: int, options: OptimizerOptions, settings: dict[str, Any]) -> dict[str, Any]:
    (first, norm), (second, _) = (train(family, moved, seed, steps, options, settings) for moved in (False, True))
    apart = [abs(a - b) / a for a, b in zip(first, second, strict=True)]
    return {
        "family": family, "seed": seed, "losses": first, "apart": apart, "largest": max(apart), "gradient_norm": norm,
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """Markdown: the worst seed of every preset."""
    lines = ["| preset | losses apart, at most | largest gradient norm | last loss |", "|---|---|---|---|"]
    for family in dict.fromkeys(run["family"] for run in record["runs"]):
        worst = max((run for run in record["runs"] if run["family"] == family), key=lambda run: run["largest"])
        norm, last = worst["gradient_norm"], worst["losses"][-1]
        lines.append(f"| {family} | {worst['largest']:.0e} | {norm:.1f} | {last:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=OptimizerOptions().lr)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the model's configuration")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--table", type=Path, metavar="JSON", help="train nothing, print the table of this")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text())))
        return
    torch.set_num_threads(1)
    settings = {name: ast.literal_eval(value) for name, value in (each.split("=") for each in arguments.set)}
    options, runs = OptimizerOptions(lr=arguments.lr), []
    for family in arguments.families:
        for seed in range(arguments.seeds):
            runs.append(measure(family, seed, arguments.steps, options, settings))
            print(f"  {family}, seed {seed}: {runs[-1]['largest']:.1e}", flush=True)
    record = {
        "what": "relative difference of the losses of two runs that begin one last bit of fp32 apart in one matrix",
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "cpus": os.cpu_count(),
        "steps": arguments.steps,
        "lr": arguments.lr,
        "settings": settings,
        "runs": runs,
    }
    print(table(record))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
