"""Predicted beside measured steps, time and memory, of every family: `python -m benchmarks.plan_table`.

Reads the measured steps of benchmarks/results and prints the documentation's table. Exit code 1 where a constant in
lasp.analysis.measured is not that of the files (by more than 0.01), a time is off by more than a tenth, or memory by
more than a twentieth.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lasp.analysis.devices import device
from lasp.analysis.measured import measured
from lasp.analysis.planner import Estimate, Job, ParallelLayout, estimate
from lasp.models import preset

RESULTS = Path(__file__).parent / "results"
FILES = ("2026-11-30-nvidia-h200-train-families.json",)


def runs() -> Iterator[dict[str, Any]]:
    for name in FILES:
        yield from json.loads((RESULTS / name).read_text())["runs"]


def predicted(run: dict[str, Any], tokens: int, slowdown: float, kept: float) -> Estimate:
    config = preset(*run["model"].rsplit("-", 1), **run["overrides"])
    job = Job(
        config=config, device=device("h200"), devices=1, seq_len=tokens, batch=1, slowdown=slowdown, kept=kept
    )  # fmt: skip
    return estimate(job, ParallelLayout("data", 1, 1, "ddp", run["recomputation"], "-"))


def constants(run: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Slowdown and kept: means over the lengths of what was measured relative to the formulas."""
    plain = [predicted(run, row["tokens"], 1.0, 1.0) for row in rows]
    slowdown = [row["step_s"] / each.step_s for row, each in zip(rows, plain, strict=True)]
    held = [sum(each.memory[:3]) for each in plain]
    kept = [
        (row["peak_memory_bytes"] - weights) / (each.memory.total - weights)
        for row, each, weights in zip(rows, plain, held, strict=True)
    ]
    return statistics.mean(slowdown), statistics.mean(kept)


def main() -> int:
    failed = False
    print("| model | | tokens | tokens/s predicted | measured | | GiB predicted | measured | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run in runs():
        rows = [row for row in run["rows"] if row["step_s"] is not None]
        config = preset(*run["model"].rsplit("-", 1), **run["overrides"])
        steps = measured(config, "H200", compiled=run["compile"])
        assert steps is not None, run["model"]
        found = constants(run, rows)
        if max(abs(a - b) for a, b in zip(found, (steps.slowdown, steps.kept), strict=True)) > 0.01:
            print(f"lasp.analysis.measured: {run['model']} is {found[0]:.2f}, {found[1]:.2f}")
            failed = True
        for row in rows:
            guess, gib = predicted(run, row["tokens"], steps.slowdown, steps.kept), row["peak_memory_bytes"] / 2**30
            off, more = guess.tokens_per_s / row["tokens_per_s"] - 1, guess.memory.total / 2**30 / gib - 1
            failed |= abs(off) > 0.1 or abs(more) > 0.05
            cells = [run["model"], "compiled" if run["compile"] else "eager", f"{row['tokens']:,}"]
            cells += [f"{guess.tokens_per_s:,.0f}", f"{row['tokens_per_s']:,.0f}", f"{off:+.0%}"]
            cells += [f"{guess.memory.total / 2**30:.1f}", f"{gib:.1f}", f"{more:+.0%}"]
            print(f"| {' | '.join(cells)} |")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
