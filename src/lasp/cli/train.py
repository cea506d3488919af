"""`lasp train`: configuration from a TOML file and options, then train here or in processes of its own."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lasp.train.config import AUTO, ModelOptions, TrainConfig, from_dict, load_toml
from lasp.train.errors import STOPPED_EXIT_CODE, CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a linear-attention language model with its sequences split over processes.

    Without options: transnormer-tiny on the Python standard library's source, two processes on this machine.
    Under torchrun (or with RANK and WORLD_SIZE set) the same command joins the processes that are there.
    Ctrl-C finishes the step, saves a checkpoint and ends.
    """

    config: Path | None = None
    """TOML file of settings; options given here win over it."""
    resume: Path | None = None
    """Run folder or checkpoint to continue. Settings come from it; options given here win over them. "auto": go on in
    --run-dir if it has a checkpoint, else begin there, with the settings given here: the same command starts a run and
    restarts it."""
    nproc: int | None = None
    """Processes to start on this machine; default: dp x sp."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def parse(arguments: Sequence[str]) -> TrainArguments:
    """The arguments of one run. Raises ConfigError or CheckpointError; SystemExit on --help and misspellings."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--resume", type=Path)
    early.add_argument("--init-from", type=Path)
    try:
        known, _ = early.parse_known_args(list(arguments))
    except SystemExit:  # an option without its value: the full parser says it better
        known = argparse.Namespace(config=None, resume=None, init_from=None)
    resume_auto = known.resume == AUTO
    if known.config is not None and known.resume is not None and not resume_auto:
        raise ConfigError("--config and --resume both bring settings: give one of them, and options for changes")
    base = TrainConfig()
    if known.config is not None:
        base = load_toml(known.config)
    elif known.resume is not None and not resume_auto:
        base = _settings_of(known.resume)
    init_from = known.init_from or base.init_from
    if init_from is not None and base.model == ModelOptions():  # the model is the one whose weights are taken
        from lasp.train.export import model_options

        base = dataclasses.replace(base, model=model_options(init_from))
    options = tyro.cli(
        TrainArguments,
        args=list(arguments),
        default=TrainArguments(settings=base),
        prog="lasp train",
        console_outputs=_speaks(),
    )
    if options.resume == AUTO and options.settings.run_dir is None:
        raise ConfigError("--resume auto goes on in the run folder if it can: name it with --run-dir")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run `lasp train ARGUMENTS`."""
    options = parse(arguments)
    config = options.settings
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        if options.nproc is not None:
            raise ConfigError("--nproc starts processes, but a launcher has started them already: leave it out")
        return _train(config, options.resume)
    num_processes = options.nproc
    if num_processes is None:
        num_processes = (config.parallel.dp or 1) * config.parallel.sp
    if num_processes < 1:
        raise ConfigError(f"--nproc must be at least 1, got {num_processes}")
    config.validate(num_processes)
    if num_processes == 1:
        return _train(config, options.resume)
    from lasp.cli.launch import launch

    return launch(["train", *_without_nproc(arguments)], num_processes)


def _train(config: TrainConfig, resume: Path | None) -> int:
    from lasp.train.loop import train

    return STOPPED_EXIT_CODE if train(config, resume=resume).stopped else 0


def _settings_of(path: Path) -> TrainConfig:
    from lasp.train.checkpoint import find

    # Quiet here, and quick: the run itself reads the tensors and reports what it skipped.
    found = find(path, report=lambda _: None, contents=False)
    try:
        return from_dict(TrainConfig, {**found.state["config"], "run_dir": None})
    except ConfigError as error:
        raise CheckpointError(
            f"{found.folder} was written with other settings than this version has: {error}"
        ) from error


def _without_nproc(arguments: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc")
    return parser.parse_known_args(list(arguments))[1]


def _speaks() -> bool:
    """Only the first process prints usage and errors of parsing."""
    return os.environ.get("RANK", "0") == "0"
