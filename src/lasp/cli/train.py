"""`lasp train`: configuration from a TOML file and options, then train here or in processes of its own."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from lasp.cli.train_arguments import TrainArguments, arguments_of
from lasp.errors import STOPPED_EXIT_CODE, ConfigError
from lasp.train.config import TrainConfig

__all__ = ["TrainArguments", "arguments_of", "main"]


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
    from lasp.distributed import launcher

    return launcher.launch(["train", *_without_nproc(arguments)], num_processes)


def _train(config: TrainConfig, resume: Path | None) -> int:
    from lasp.train.trainer import train

    return STOPPED_EXIT_CODE if train(config, resume=resume).stopped else 0


def _without_nproc(arguments: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc")
    return parser.parse_known_args(list(arguments))[1]
