"""Plans of training runs: a job from their settings, and the command line of the layout that is recommended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lasp.analysis.devices import Device, described, device
from lasp.analysis.plan_text import options as layout_options
from lasp.analysis.planner import Job
from lasp.errors import ConfigError
from lasp.train.config import ModelOptions, TrainConfig
from lasp.train.logging.program import lasp_command
from lasp.train.settings_file import read_toml
from lasp.train.sizes import tokens


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
    compile: bool = False
    """Blocks run compiled (`lasp train --compile`); a --config that says so too."""
    json: bool = False
    """Print everything as JSON instead of the table."""
    plot: Path | None = None
    """Picture (.png, .pdf, .svg): volume against length, longest sequence and throughput against devices."""


def job_of(config: PlanConfig, run: TrainConfig | None) -> tuple[Job, str]:
    """The job and its model's name. Raises ConfigError.

    Args:
        run: the settings of --config, which win over those of `config`.
    """
    options, batch, precision = config.model, config.global_batch, config.precision
    seq_len = tokens(config.seq_len, "--seq-len")
    if run is not None:
        options, seq_len, batch, precision = run.model, run.seq_len, run.global_batch, precision or run.precision
    if not 1 <= config.gpus <= 1 << 16:
        raise ConfigError(f"--gpus must be from 1 to {1 << 16}, got {config.gpus}")
    if batch < 1:
        raise ConfigError(f"--global-batch must be at least 1, got {batch}")
    model = options.build()
    kind = _device(config.gpu)
    kind = kind.training_in(precision or kind.precision)
    job = Job(config=model, device=kind, devices=config.gpus, seq_len=seq_len, batch=batch)
    return job, f"{options.family}-{options.size}"


def _device(gpu: str) -> Device:
    is_file = gpu.endswith(".toml")
    try:
        return described(read_toml(Path(gpu), "description of a GPU")) if is_file else device(gpu)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"--gpu {gpu}: {error}" if is_file else f"--gpu: {error}") from error


def command_of(config: PlanConfig, run: TrainConfig | None, found: dict[str, Any]) -> str | None:
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
    words += [word for option in layout_options(entry) for word in option.split()]
    if config.compile and (run is None or not run.parallel.compile):
        words += ["--compile"]
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
