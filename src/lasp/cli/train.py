"""`lasp train`: configuration from a TOML file and options, then train here or in processes of its own."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lasp.cli.options import early, parse
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


def arguments_of(arguments: Sequence[str]) -> TrainArguments:
    """The arguments of one run. Raises ConfigError or CheckpointError; SystemExit on --help and misspellings."""
    file, resume, weights = early(arguments, "--config", "--resume", "--init-from")
    resumes = resume is not None and resume != AUTO
    if weights is not None and resumes:
        raise ConfigError("--resume goes on with a run's own weights, --init-from starts a new run: give one of them")
    if file is not None and resumes:
        raise ConfigError("--config and --resume both bring settings: give one of them, and options for changes")
    base = TrainConfig()
    if file is not None:
        base = load_toml(file)
    elif resume is not None and resumes:
        base = _settings_of(resume)
    init_from = weights or base.init_from
    if init_from is not None and not resumes and base.model == ModelOptions():  # the model whose weights are taken
        from lasp.train.export import model_options

        base = dataclasses.replace(base, model=model_options(init_from))
    options = parse(TrainArguments, arguments, "lasp train", TrainArguments(settings=base))
    if options.resume == AUTO and options.settings.run_dir is None:
        raise ConfigError("--resume auto goes on in the run folder if it can: name it with --run-dir")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run `lasp train ARGUMENTS`."""
    options = arguments_of(arguments)
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
