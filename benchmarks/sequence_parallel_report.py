"""Shows what `benchmarks.sequence_parallel` measured: goals, table, picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Tokens a rank: what a layer over two GPUs may cost, in times of one.
GOALS = {8192: 1.08, 32768: 1.02}


def goals(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Goals that this run could reach or miss: of two ranks on GPUs, by either launch."""
    if record["device"] == "cpu" or record["ranks"] != 2:
        return []
    ratios: dict[tuple[str, int], dict[str, float]] = {}
    for row in record["rows"]:
        if row["method"] == "auto" and "to_one" in row:
            ratios.setdefault((row["of"], row["tokens"]), {})[row["launch"]] = row["to_one"]
    return [
        {"of": of, "tokens": tokens, "at_most": GOALS[tokens], "got": got, "met": min(got.values()) <= GOALS[tokens]}
        for (of, tokens), got in ratios.items()
        if tokens in GOALS
    ]


def goal_line(goal: dict[str, Any]) -> str:
    got = ", ".join(f"{launch} {ratio:.3f}" for launch, ratio in goal["got"].items())
    by = [launch for launch, ratio in goal["got"].items() if ratio <= goal["at_most"]]
    return (
        f"goal of the {goal['of']} at {goal['tokens']:,} tokens: at most {goal['at_most']} times one rank; {got}: "
        + (f"met by {' and '.join(by)}" if by else "MISSED")
    )


def table(record: dict[str, Any]) -> str:
    """Markdown: milliseconds."""
    lines = [
        f"{record['ranks']} ranks, {record['where']}, H={record['heads']} D={record['head_dim']} {record['dtype']}, "
        f"forward and backward, torch {record['torch']}",
        "",
        "| tokens a rank | of | launch | method | ms | times one rank | exchange alone | exposed | hidden |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        tokens = f"{row['tokens']:,}" if "tokens" in row else ""
        if "refused" in row:
            reason = " ".join(row["refused"].split())[:80]
            cells = (tokens, row["of"], row["launch"], row["method"], f"refused: {reason}", "", "", "", "")
            lines.append(f"| {' | '.join(cells)} |")
            continue
        times = "" if "to_one" not in row else f"{row['to_one']:.3f}"
        exchange = [f"{1e3 * row[name]:.3f}" if name in row else "" for name in ("exchange_s", "exposed_s", "hidden_s")]
        wrong = "" if row.get("is_right", True) else f" (wrong: error {row['error']:.1e})"
        cells = (tokens, row["of"], row["launch"], row["method"] + wrong, f"{1e3 * row['s']:.3f}", times, *exchange)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n\n".join(["\n".join(lines), *(goal_line(goal) for goal in record["goals"])])


def plot(record: dict[str, Any], image: Path) -> None:
    """Times one rank's by method and length, of the recurrence and the layer; the recurrence's exposed exchange where
    it weighs most, at the shortest length.

    Graphs have solid lines. What the host launches has dashed ones, beside graphs only "auto" and peers.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.6), layout="constrained")
    *panels, right = figure.subplots(1, 3)
    rows = [row for row in record["rows"] if "to_one" in row]
    has_graphs = any(row["launch"] == "graph" for row in rows)
    if has_graphs:
        rows = [row for row in rows if row["launch"] == "graph" or row["method"] == "auto" or "exchange_s" not in row]
    for of, panel in zip(("recurrence", "layer"), panels, strict=True):
        own = [row for row in rows if row["of"] == of]
        plot_times(panel, own)
        panel.set(xscale="log", xlabel="tokens a rank", ylabel="time, in times one rank's", title=of)
    own = [row for row in rows if row["of"] == "recurrence" and "exchange_s" in row]
    own = [row for row in own if row["launch"] == "graph" or not has_graphs]
    if own:
        shortest = min(row["tokens"] for row in own)
        own = [row for row in own if row["tokens"] == shortest]
        names = [f"{row['method']}, {row['launch']}" for row in own]
        right.invert_yaxis()
        right.barh(names, [1e6 * row["exchange_s"] for row in own], color="lightgrey", label="exchange by itself")
        right.barh(names, [1e6 * row["exposed_s"] for row in own], height=0.4, label="exposed in the recurrence")
        right.set(xlabel="microseconds, forward and backward", title=f"{shortest:,} tokens a rank")
        right.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{record['ranks']} ranks, {record['where']}", fontsize=10)
    figure.savefig(image, dpi=120)


def plot_times(panel: Any, rows: list[dict[str, Any]]) -> None:
    colours: dict[str, str] = {}
    for method, launch in dict.fromkeys((row["method"], row["launch"]) for row in rows):
        own = [row for row in rows if (row["method"], row["launch"]) == (method, launch)]
        colour = colours.setdefault(method, f"C{len(colours) % 10}")
        line = "-" if launch == "graph" else "--"
        times = [row["to_one"] for row in own]
        panel.plot([row["tokens"] for row in own], times, line, c=colour, marker=".", label=f"{method}, {launch}")
    panel.axhline(1, color="grey", linewidth=0.8)
    if rows:
        panel.legend(frameon=False, fontsize=6)
