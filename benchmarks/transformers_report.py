"""Prints the table of what `benchmarks/transformers_models.py` measured, from its JSON lines.

python benchmarks/transformers_report.py benchmarks/results/2026-11-30-nvidia-h200-transformers-models.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def table(records: Iterable[dict[str, Any]]) -> str:
    """Markdown: a row for every length, then each variant's longest sequence and the errors of two processes."""
    measured: dict[tuple[str, int], dict[str, str]] = {}
    variants: dict[str, None] = {}
    notes = []
    for record in records:
        if "tokens_per_s" in record:
            cell = f"{record['tokens_per_s']:,.0f}, {record['peak_GiB']:.1f}"
            measured.setdefault((record["model"], record["tokens"]), {})[record["variant"]] = cell
            variants[record["variant"]] = None
        elif record.get("longest"):
            fit = f", by memory {record['would_fit']:,} would fit" if record["would_fit"] else ""
            notes.append(
                f"- {record['model']}, {record['variant']}: up to {record['longest']:,} tokens, ended by "
                f"{record['ended_by']}{fit}"
            )
        elif "failed" in record:
            notes.append(f"- {record['model']}, {record['variant']}: {record['failed'].strip().splitlines()[-1]}")
        elif "alone" in record:
            errors = ", ".join(
                f"{name.replace('_', ' ')} {record[name]:.1e}" for name in sorted(record) if "_to_" in name
            )
            notes.append(
                f"- {record['model']}, two processes in {record['dtype']}: {errors}; a rank by itself "
                f"{record['alone']:.1e}"
            )
    lines = [f"| model | tokens | {' | '.join(f'{name}: tokens/s, peak GiB' for name in variants)} |"]
    lines.append("|---" * (2 + len(variants)) + "|")
    for (model, tokens), cells in measured.items():
        lines.append(f"| {model} | {tokens:,} | {' | '.join(cells.get(name, '') for name in variants)} |")
    return "\n".join([*lines, "", *notes])


if __name__ == "__main__":
    print(table(json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()))
