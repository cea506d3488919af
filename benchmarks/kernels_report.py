"""Tables and a plot of docs/results/kernels.md from the JSON of benchmarks/kernels.py.

python benchmarks/kernels_report.py benchmarks/results/<file>.json    # needs the extra `report` (matplotlib)
python benchmarks/kernels_report.py <file>.json --peers <file of a run with peers>.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- begin: made by benchmarks/kernels_report.py -->", "<!-- end -->"


def speed_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "| B, T, H, D | decay | | forward ms: **graph**, eager (floor) | forward+backward ms | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        shape = ", ".join(map(str, row["shape"]))
        if "error" in row:
            lines.append(f"| {shape} | {row['kind']} | {row['implementation']} | {row['error'][:60]} | | |")
            continue
        cells = []
        for part in ("forward", "both"):
            graph = f"**{row['graph'][part]['median']:.3f}**, " if "graph" in row else ""
            cells.append(f"{graph}{row[part]['median']:.3f} ({row['floor'][part]:.3f})")
        name, peak = row["implementation"], row["peak_gib"]
        lines.append(f"| {shape} | {row['kind']} | {name} | {cells[0]} | {cells[1]} | {peak:.2f} |")
    return lines


def error_table(result: dict[str, Any]) -> list[str]:
    names = ("o", "dq", "dk", "dv", "dg")
    lines = [f"| | decay | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for implementation, kinds in result.get("errors", {}).items():
        for kind, errors in kinds.items():
            cells = (f"{errors[name]:.1e}" if name in errors else "" for name in names)
            lines.append(f"| {implementation} | {kind} | {' | '.join(cells)} |")
    return lines


def crossover_table(result: dict[str, Any]) -> list[str]:
    lines = ["| tokens | forward ms | cuDNN softmax | forward+backward ms | cuDNN softmax |", "|---|---|---|---|---|"]
    for row in result.get("crossover", []):
        cells = (f"{row[name][part]['median']:.3f}" for part in ("forward", "both") for name in ("lasp", "softmax"))
        lines.append(f"| {row['tokens']} | {' | '.join(cells)} |")
    return lines


def speed(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['device']}, PyTorch {result['torch']}, Triton {result['triton']}, bf16; a large copy moves "
        f"{result['copy_tb_per_s']:.2f} TB/s, which the floors are made of.",
        "",
        *speed_table(result),
    ]


def report(result: dict[str, Any]) -> str:
    lines = [
        *speed(result),
        "",
        "Relative errors against fp64, T = 4096:",
        "",
        *error_table(result),
        "",
        "Kernels alone (CUDA graphs), constant decay, B = 1, H = 16, D = 128:",
        "",
        *crossover_table(result),
        "",
    ]
    if "cold_start_s" in result:
        cold = ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in result["cold_start_s"].items())
        lines.append(f"Cold start s: {cold}.\n")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    tokens = [row["tokens"] for row in result["crossover"]]
    for name, label in (("lasp", "linear attention, constant decay"), ("softmax", "softmax attention (cuDNN)")):
        axes.loglog(tokens, [row[name]["both"]["median"] for row in result["crossover"]], marker="o", label=label)
    axes.set(
        xlabel="tokens", ylabel="forward+backward, ms", title=f"Kernels alone, H = 16, D = 128, {result['device']}"
    )
    axes.set_xticks(tokens, [str(count) for count in tokens], minor=False)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--peers", type=Path)
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    page = DOCS / "results" / "kernels.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    peers = ""
    if options.peers is not None:
        peers = "\n".join(["Beside peers:", "", *speed(json.loads(options.peers.read_text()))]) + "\n\n"
    page.write_text(f"{before}{BEGIN}\n{report(result)}\n{peers}{END}{after}")
    if result.get("crossover"):
        plot(result, DOCS / "img" / "kernels-crossover.png")


if __name__ == "__main__":
    main()
