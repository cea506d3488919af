"""Predicted beside measured steps, time and memory, of every family: `python -m benchmarks.plan_table`.

Reads the measured steps of benchmarks/results and prints the documentation's table; with --steps that of the measured
ones alone, and with --parts what a step spent its time on; --plot FILE draws the measured ones. Exit code 1 where a
constant in lasp.analysis.measured is not that of the files (by more than 0.01), a time is off by more than a tenth, or
memory by more than a twentieth.
"""

from __future__ import annotations

import argparse
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
FILES = ("2026-11-30-nvidia-h200-train-families-2.json", "2026-11-30-nvidia-h200-train-families-4.json")


def runs() -> Iterator[dict[str, Any]]:
    """The runs of all files; of those of one model, run in one way, the last."""
    found = {}
    for name in FILES:
        for run in json.loads((RESULTS / name).read_text())["runs"]:
            found[run["model"], run["compile"]] = run
    yield from found.values()


def predicted(run: dict[str, Any], tokens: int, slowdown: float, kept: float) -> Estimate:
    config = preset(*run["model"].rsplit("-", 1), **run["overrides"])
    job = Job(
        config=config, device=device("h200"), devices=1, seq_len=tokens, batch=1, slowdown=slowdown, kept=kept,
        compiled=run["compile"],
    )  # fmt: skip
    return estimate(job, ParallelLayout("data", 1, 1, "ddp", run["recomputation"], "-"))


def constants(run: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Slowdown, the mean over the lengths of what was measured relative to the formulas, and kept, of all together."""
    plain = [predicted(run, row["tokens"], 1.0, 1.0) for row in rows]
    slowdown = [row["step_s"] / each.step_s for row, each in zip(rows, plain, strict=True)]
    held = [sum(each.memory[:3]) for each in plain]  # of gradients what is more than activations: nothing
    kept = sum(row["peak_memory_bytes"] for row in rows) - sum(held)
    return statistics.mean(slowdown), kept / (sum(each.memory.total for each in plain) - sum(held))


def steps_table() -> None:
    """Print tokens/s, utilisation and peak memory in GiB of every model, eager and compiled."""
    cells: dict[str, dict[tuple[int, bool], str]] = {}
    for run in runs():
        for row in run["rows"]:
            figures = f"{row['tokens_per_s']:,.0f}, {100 * row['utilisation']:.1f} %"
            figures += f", {row['peak_memory_bytes'] / 2**30:.1f}"
            cells.setdefault(run["model"].rsplit("-", 1)[0], {})[row["tokens"], run["compile"]] = figures
    columns = sorted({column for row in cells.values() for column in row})
    names = [f"{tokens:,} tokens, {'compiled' if compiled else 'eager'}" for tokens, compiled in columns]
    print(f"| model | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for name, row in cells.items():
        print(f"| {name} | {' | '.join(row[column] for column in columns)} |")


def plot(image: Path) -> None:
    """Draw utilisation and peak memory of the longest steps of every model, eager and compiled."""
    from matplotlib.figure import Figure

    longest = {(run["model"].rsplit("-", 1)[0], run["compile"]): run["rows"][-1] for run in runs()}
    models = list(dict.fromkeys(model for model, _ in longest))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for compiled, label, side in ((False, "eager", -0.2), (True, "compiled", 0.2)):
        rows = [longest[model, compiled] for model in models]
        places = [place + side for place in range(len(models))]
        panels[0].bar(places, [100 * row["utilisation"] for row in rows], 0.38, label=label)
        panels[1].bar(places, [row["peak_memory_bytes"] / 2**30 for row in rows], 0.38, label=label)
    for panel, name, goal in zip(panels, ("utilisation, %", "peak memory, GiB"), (45, 75), strict=True):
        panel.set(ylabel=f"{name}, {rows[0]['tokens']:,} tokens")
        panel.axhline(goal, color="grey", linewidth=0.8, linestyle="--")
        panel.set_xticks(range(len(models)), models, rotation=40, ha="right", fontsize=8)
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(image, dpi=120)


def parts_table() -> None:
    """Print milliseconds of every part of a profiled step, and the floor of those that have one."""
    profiled = [run for run in runs() if run["parts"]]
    parts = list(profiled[0]["parts"])
    print(f"| model | {' | '.join(parts)} |\n|{'---|' * (len(parts) + 1)}")
    for run in profiled:
        row = []
        for part in parts:
            found = run["parts"][part]
            floor = found.get("floor_s", 0.0)
            row.append(f"{1e3 * found['s']:.0f}" + (f" ({1e3 * floor:.0f})" if floor else ""))
        print(f"| {run['model']} | {' | '.join(row)} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs the extra `report` (matplotlib)")
    options = parser.parse_args()
    if options.plot is not None:
        plot(options.plot)
        return 0
    if options.steps or options.parts:
        (steps_table if options.steps else parts_table)()
        return 0
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
