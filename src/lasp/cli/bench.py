"""`lasp bench exchange` and `lasp bench train`: figures of the processes that are there, or of some started here."""

import json
from collections.abc import Sequence

from lasp import files
from lasp.bench.exchanges import BenchConfig, run, table
from lasp.bench.steps import BenchTrainConfig, for_device, measure
from lasp.cli.arguments import early, is_first, is_launched, parse
from lasp.distributed import launcher
from lasp.errors import ConfigError
from lasp.terminal import say


def main(arguments: Sequence[str]) -> int:
    """Run `lasp bench ARGUMENTS`."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name == "train":
        return _train(rest)
    if name == "exchange":
        return _exchange(rest)
    if name in ("-h", "--help"):
        say("usage: lasp bench exchange|train [OPTIONS]      (lasp bench exchange --help lists them)")
        return 0
    raise ConfigError("lasp bench can measure two things: lasp bench exchange, and lasp bench train")


def _exchange(arguments: Sequence[str]) -> int:
    config = parse(BenchConfig, arguments, "lasp bench exchange")
    config.validate(writes=is_first())
    if not is_launched():
        return launcher.launch(["bench", "exchange", *arguments], config.nproc)
    figures = run(config)
    if is_first():
        say(table(figures))
        if config.output is not None:
            files.write_output(config.output, json.dumps(figures, indent=1) + "\n")
    return 0


def _train(arguments: Sequence[str]) -> int:
    (device,) = early(arguments, "--device")
    config = parse(BenchTrainConfig, arguments, "lasp bench train", for_device(str(device or "auto")))
    config.validate(writes=is_first())
    if not is_launched():
        config.training(config.num_processes)  # a layout that does not fit is one message, before anything starts
        if config.num_processes > 1:
            return launcher.launch(["bench", "train", *arguments], config.num_processes)
    figures = measure(config, report=say if is_first() else None)
    return 0 if any(row["step_s"] is not None for row in figures["rows"]) else 1
