"""Reads the arguments of `lasp train`: options, over those of a TOML file, a run to resume or weights to start from."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lasp.cli.arguments import early, parse
from lasp.errors import CheckpointError, ConfigError
from lasp.train.config import AUTO, ModelOptions, TrainConfig
from lasp.train.settings_file import from_dict, load_toml


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
        from lasp.train.checkpoint.export import model_options

        base = dataclasses.replace(base, model=model_options(init_from))
    options = parse(TrainArguments, arguments, "lasp train", TrainArguments(settings=base))
    if options.resume == AUTO and options.settings.run_dir is None:
        raise ConfigError("--resume auto goes on in the run folder if it can: name it with --run-dir")
    return options


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
