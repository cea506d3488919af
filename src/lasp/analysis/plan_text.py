"""A plan in words: the table of methods, the layouts to take, and what the numbers rest on."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from lasp.terminal import Terminal

_TIES_SHOWN = 6


def options(entry: dict[str, Any]) -> list[str]:
    """A layout in the words of `lasp train`."""
    exchange = [f"--exchange {entry['schedule']}"] if entry["method"] == "lasp" and entry["schedule"] != "none" else []
    return [
        f"--dp {entry['dp']}",
        f"--sp {entry['sp']}",
        f"--data-parallel {entry['sharding']}",
        f"--recomputation {entry['recomputation']}",
        *exchange,
    ]


def show(found: dict[str, Any], console: Terminal) -> None:
    """Print what `lasp.analysis.report.plan` found, and the command that runs it."""
    unseen = "" if found["measured"] else " (not measured)"
    console.print(_methods(found))
    for entry in found["methods"]:
        if "reason" in entry:
            console.print(f"{entry['method']}: {entry['reason']}")
    if found["recommended"] is None:
        console.print("Nothing fits: take more devices, a shorter sequence or a smaller model.")
    for title, which in (("Recommended", ""), ("With lasp train's defaults", "_for_lasp_train")):
        if found[f"recommended{which}"] is not None:
            _recommend(found, title, which, unseen, console)
    if found["command"] is not None:
        best = found["recommended_of_lasp_train"]
        rate = f"{_rate(best, found)} tokens/s{unseen}, {best['memory_bytes'] / 1e9:.1f} GB"
        console.print(f"The fastest that lasp train does ({rate}), with --data.path for your text:")
        console.print(f"  {found['command']}", soft_wrap=True)
        if found["hosts"] > 1:
            console.print(
                f"  It starts all its processes on one machine: for {found['hosts']} hosts give these options to "
                "examples/slurm/train.sbatch or to torchrun (docs/guide/training.md).",
            )
    console.print(
        "GB each: of the fullest device. waits: share of a step spent waiting for others. received: by one rank along\n"
        "the sequence, a step. ring is the same model with softmax attention. longest: a power of two, by the layout\n"
        "that saves most memory.\n\nWhat the numbers rest on:",
    )
    for name, basis in found["rests_on"].items():
        console.print(f"  {name}: {basis}")


def _methods(found: dict[str, Any]) -> Table:
    table = Table(
        title=f"{found['model']} ({found['model_parameters'] / 1e6:,.0f}M parameters), {found['batch']} x "
        f"{length_text(found['seq_len'])} tokens on {found['devices']} x {found['device']}, "
        f"{found['precision']}, {'compiled' if found['compiled'] else 'eager'}"
        + ("" if found["measured"] else "; not measured")
    )
    columns = ("method", "fits", "GB each", "tokens/s", "step", "waits", "received", "dp x sp", "data-parallel")
    for column in (*columns, "recomputation", "exchange", "longest"):
        table.add_column(column, justify="left" if column in ("method", "fits", "exchange") else "right")
    for entry in found["methods"]:
        limit = length_text(entry["longest_tokens"]) if entry["longest_tokens"] else "-"
        if "reason" in entry:
            table.add_row(entry["method"], "no", *["-"] * 9, limit)
            continue
        table.add_row(
            entry["method"],
            "yes" if entry["fits"] else "no",
            f"{entry['memory_bytes'] / 1e9:.1f}",
            _rate(entry, found),
            f"{entry['step_s']:.3g} s",
            f"{entry['communication_share']:.0%}",
            _bytes(entry["received_bytes"]),
            f"{entry['dp']} x {entry['sp']}",
            entry["sharding"],
            entry["recomputation"],
            entry["schedule"],
            limit,
        )
    return table


def _recommend(found: dict[str, Any], title: str, which: str, unseen: str, console: Terminal) -> None:
    best, ties = found[f"recommended{which}"], found[f"ties{which}"]
    console.print(
        f"{title}: {' '.join(_parts(best))}; {_rate(best, found)} tokens/s{unseen}, "
        f"{best['memory_bytes'] / 1e9:.1f} GB.",
    )
    if ties:
        others = [" ".join(part for part in _parts(each) if part not in _parts(best)) for each in ties]
        more = f"; and {len(others) - _TIES_SHOWN} more" if len(others) > _TIES_SHOWN else ""
        console.print(
            f"  By prediction within {found['tie']:.0%} of it, so as good: {'; '.join(others[:_TIES_SHOWN])}{more}.",
        )


def _rate(entry: dict[str, Any], found: dict[str, Any]) -> str:
    """Tokens/s, a range where nothing like it was measured."""
    low, high = (entry["tokens_per_s"] * end for end in found["range"])
    return f"{high:,.0f}" if low == high else f"{float(f'{low:.2g}'):,.0f} to {float(f'{high:.2g}'):,.0f}"


def _parts(entry: dict[str, Any]) -> list[str]:
    return [f"method {entry['method']}", *options(entry)]


def length_text(count: int) -> str:
    """ "64K", "1M"."""
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
