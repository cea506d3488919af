"""Every way of carrying the state, timed on 2, 4 and 8 processes, against what the cost model predicts.

    python benchmarks/exchange.py                       (about 5 minutes on two cores)
    python benchmarks/exchange.py --table RESULT.json   (the documentation's table of a kept result)
    torchrun --nproc-per-node 2 -m benchmarks.exchange  (the processes that are there, as benchmarks.collectives)

Each group of processes first measures the constants of the model (`lasp bench exchange`), then times the schedules,
which take turns. The table says how far the chosen schedule is from the fastest measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def measured(size: int, repetitions: int) -> dict:
    """The figures of `size` processes; their table is printed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "lasp.cli.main", "bench", "exchange", "--nproc", str(size)]
        subprocess.run(
            [*command, "--repetitions", str(repetitions), "--output", str(output)],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return json.loads(output.read_text()) | {"load_average": os.getloadavg()}


def summary(figures: list[dict]) -> list[dict]:
    """Says for every group and load what was chosen, what was fastest, and how far the predictions are off."""
    lines = []
    for group in figures:
        for load in dict.fromkeys((row["state_bytes"], row["transition"]) for row in group["rows"]):
            rows = [row for row in group["rows"] if (row["state_bytes"], row["transition"]) == load]
            best = min(rows, key=lambda row: row["measured_s"])
            chosen = next(row for row in rows if row["chosen"])
            lines.append(
                {
                    "ranks": group["ranks"],
                    "state_bytes": load[0],
                    "transition": load[1],
                    "chosen": chosen["schedule"],
                    "fastest": best["schedule"],
                    "chosen_to_fastest": chosen["measured_s"] / best["measured_s"],
                    "chosen_quartiles_s": chosen["quartiles_s"],
                    "predicted_to_measured": {row["schedule"]: row["predicted_s"] / row["measured_s"] for row in rows},
                }
            )
    return lines


def table(record: dict) -> str:
    """Markdown: predicted / measured milliseconds by schedule, the chosen one in bold."""
    names = {"hierarchical, doubling across": "hierarchical"}
    columns = ("ring", "pipelined", "doubling", "all_to_all", "hierarchical", "all_gather")
    lines = ["| ranks | state | " + " | ".join(f"`{name}`" for name in columns) + " | chosen / fastest |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for line in record["summary"]:
        group = next(group for group in record["groups"] if group["ranks"] == line["ranks"])
        load = (line["state_bytes"], line["transition"])
        rows = [row for row in group["rows"] if (row["state_bytes"], row["transition"]) == load]
        cells = {}
        for row in rows:
            cell = f"{1e3 * row['predicted_s']:.3g} / {1e3 * row['measured_s']:.3g}"
            cells[names.get(row["schedule"], row["schedule"])] = f"**{cell}**" if row["chosen"] else cell
        state = f"{load[0] >> 10} KiB" + (", dense" if load[1] > 1 else "")
        shown = " | ".join(cells[name] for name in columns)
        lines.append(f"| {line['ranks']} | {state} | {shown} | {line['chosen_to_fastest']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--table", type=Path, help="print the table of this result, and measure nothing")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text())))
        return
    figures = [measured(size, arguments.repetitions) for size in arguments.sizes]
    lines = summary(figures)
    print("\nranks      state  transition  chosen        fastest       chosen / fastest")
    for line in lines:
        print(
            f"{line['ranks']:>5} {line['state_bytes'] >> 10:>6} KiB {line['transition']:>10}  {line['chosen']:<14}"
            f"{line['fastest']:<14}{line['chosen_to_fastest']:.2f}"
        )
    record = {
        "what": "time of one exchange by schedule, predicted and measured",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "summary": lines,
        "groups": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record['date']}-cpu-exchange.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}; the largest ratio is {max(line['chosen_to_fastest'] for line in lines):.2f}")


if __name__ == "__main__":
    if "RANK" in os.environ:  # under a launcher: operations of what is there, and the cost model's constants
        from benchmarks import collectives

        raise SystemExit(collectives.main())
    main()
