"""`lasp plan`: what fits where, how fast, and which layout to take, before any device is rented."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lasp.cli.checks import check_picture
from lasp.cli.options import parse
from lasp.terminal import Terminal, say
from lasp.train.config import ModelOptions, TrainConfig, load_toml, read_toml
from lasp.train.errors import ConfigError
from lasp.train.program import lasp_command
from lasp.train.sizes import tokens

_TIES_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Predict memory, speed and the longest sequence of a training run for every method, and recommend a layout.

    Nothing is run and nothing downloaded; every number says what it rests on.
    """

    config: Path | None = None
    """TOML file of a training run: its model, sequence length, batch and precision."""
    model: ModelOptions = field(default_factory=lambda: ModelOptions(family="transnormer", size="1b"))
    """The model, where no --config is given."""
    gpu: str = "a100-80g"
    """Kind of device: a100-80g, h100, h200, cpu (a process of one thread), or a TOML file that describes another: see
    docs/guide/planning.md."""
    gpus: int = 8
    """How many."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of training; default: that of --config, else bf16 on a GPU and fp32 on a CPU."""
    seq_len: str = "64K"
    """Tokens of a sequence; 64K is 65536, 1M 1048576."""
    global_batch: Annotated[int, tyro.conf.arg(aliases=["--batch"])] = 1
    """Sequences per step, over all devices."""
    json: bool = False
    """Print everything as JSON instead of the table."""
    plot: Path | None = None
    """Picture (.png, .pdf, .svg): volume against length, longest sequence and throughput against devices."""


def main(arguments: Sequence[str]) -> int:
    """Run `lasp plan ARGUMENTS`."""
    config = parse(PlanConfig, arguments, "lasp plan")
    run = None if config.config is None else load_toml(config.config)
    job, name = _job(config, run)
    check_picture("--plot", config.plot)
    from lasp.analysis.report import curves, plan

    found = {"model": name, **plan(job)}
    found["command"] = _command(config, run, found)
    if config.plot is not None:
        _plot(found, curves(job), config.plot)
    if config.json:
        say(json.dumps(found, indent=1))
    else:
        _print(found)
    return 0


def _job(config: PlanConfig, run: TrainConfig | None) -> tuple[Any, str]:
    """The job and its model's name. run: the settings of --config, which win over those of `config`."""
    from lasp.analysis.devices import described, device
    from lasp.analysis.planner import Job

    options, seq_len, batch, precision = (
        config.model,
        tokens(config.seq_len, "--seq-len"),
        config.global_batch,
        config.precision,
    )
    if run is not None:
        options, seq_len, batch, precision = run.model, run.seq_len, run.global_batch, precision or run.precision
    if not 1 <= config.gpus <= 1 << 16:
        raise ConfigError(f"--gpus must be from 1 to {1 << 16}, got {config.gpus}")
    if batch < 1:
        raise ConfigError(f"--global-batch must be at least 1, got {batch}")
    model = options.build()
    is_file = config.gpu.endswith(".toml")
    try:
        kind = described(read_toml(Path(config.gpu), "description of a GPU")) if is_file else device(config.gpu)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"--gpu {config.gpu}: {error}" if is_file else f"--gpu: {error}") from error
    kind = kind.training_in(precision or kind.precision)
    job = Job(config=model, device=kind, devices=config.gpus, seq_len=seq_len, batch=batch)
    return job, f"{options.family}-{options.size}"


def _command(config: PlanConfig, run: TrainConfig | None, found: dict[str, Any]) -> str | None:
    """The command line of the fastest layout that `lasp train` has; None if none fits."""
    entry = found["recommended_of_lasp_train"]
    if entry is None:
        return None
    words: list[object] = ["train"]
    if run is not None:
        words += ["--config", config.config]
    else:
        words += ["--model.family", config.model.family, "--model.size", config.model.size]
        words += ["--seq-len", found["seq_len"], "--global-batch", found["batch"]]
    words += ["--precision", found["precision"], "--device", "cpu" if found["device"] == "cpu" else "cuda"]
    words += [word for option in _options(entry) for word in option.split()]
    # What the file says of how to run is not what was planned.
    if run is not None and run.accumulation > 1:
        words += ["--accumulation", 1]
    if run is not None and run.parallel.dp_replicate > 1:
        words += ["--dp-replicate", 1]
    if run is not None and run.parallel.cpu_offload:
        words += ["--no-cpu-offload"]
    if run is None and config.model.overrides:
        words += ["--model.overrides", *(word for change in config.model.overrides.items() for word in change)]
    return lasp_command(*words)


def _options(entry: dict[str, Any]) -> list[str]:
    """A layout in the words of `lasp train`."""
    exchange = [f"--exchange {entry['schedule']}"] if entry["method"] == "lasp" and entry["schedule"] != "none" else []
    return [
        f"--dp {entry['dp']}",
        f"--sp {entry['sp']}",
        f"--data-parallel {entry['sharding']}",
        f"--recomputation {entry['recomputation']}",
        *exchange,
    ]


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        title=f"{found['model']} ({found['model_parameters'] / 1e6:,.0f}M parameters), {found['batch']} x "
        f"{_length(found['seq_len'])} tokens on {found['devices']} x {found['device']}, "
        f"{found['precision']}"
    )
    columns = ("method", "fits", "GB each", "tokens/s", "step", "waits", "received", "dp x sp", "data-parallel")
    for column in (*columns, "recomputation", "exchange", "longest"):
        table.add_column(column, justify="left" if column in ("method", "fits", "exchange") else "right")
    for entry in found["methods"]:
        limit = _length(entry["longest_tokens"]) if entry["longest_tokens"] else "-"
        if "reason" in entry:
            table.add_row(entry["method"], "no", *["-"] * 9, limit)
            continue
        table.add_row(
            entry["method"],
            "yes" if entry["fits"] else "no",
            f"{entry['memory_bytes'] / 1e9:.1f}",
            f"{entry['tokens_per_s']:,.0f}",
            f"{entry['step_s']:.3g} s",
            f"{entry['communication_share']:.0%}",
            _bytes(entry["received_bytes"]),
            f"{entry['dp']} x {entry['sp']}",
            entry["sharding"],
            entry["recomputation"],
            entry["schedule"],
            limit,
        )
    console = Terminal(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for entry in found["methods"]:
        if "reason" in entry:
            console.print(f"{entry['method']}: {entry['reason']}")
    if found["recommended"] is None:
        console.print("Nothing fits: take more devices, a shorter sequence or a smaller model.")
    for title, which in (("Recommended", ""), ("With lasp train's defaults", "_for_lasp_train")):
        best, ties = found[f"recommended{which}"], found[f"ties{which}"]
        if best is None:
            continue
        console.print(
            f"{title}: {' '.join(_parts(best))}; {best['tokens_per_s']:,.0f} tokens/s, "
            f"{best['memory_bytes'] / 1e9:.1f} GB.",
        )
        if ties:
            others = [" ".join(part for part in _parts(each) if part not in _parts(best)) for each in ties]
            more = f"; and {len(others) - _TIES_SHOWN} more" if len(others) > _TIES_SHOWN else ""
            console.print(
                f"  By prediction within {found['tie']:.0%} of it, so as good: "
                f"{'; '.join(others[:_TIES_SHOWN])}{more}.",
            )
    if found["command"] is not None:
        best = found["recommended_of_lasp_train"]
        rate = f"{best['tokens_per_s']:,.0f} tokens/s, {best['memory_bytes'] / 1e9:.1f} GB"
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


def _parts(entry: dict[str, Any]) -> list[str]:
    return [f"method {entry['method']}", *_options(entry)]


def _plot(found: dict[str, Any], curves: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.4), constrained_layout=True)
    parts = (
        ("volume", "lengths", "tokens of the sequence", "bytes received by a rank, a step"),
        ("longest", "devices", "devices", "longest sequence, tokens"),
        ("throughput", "devices", "devices", f"tokens/s at {_length(found['seq_len'])}"),
    )
    for axes, (name, along, x_label, y_label) in zip(panels, parts, strict=True):
        for method, values in curves[name].items():
            points = [(x, y) for x, y in zip(curves[along], values, strict=True) if y is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=method, markersize=3)
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{found['model']} on {found['device']}, predicted", fontsize=11)
    figure.savefig(path, dpi=110)


def _length(count: int) -> str:
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
