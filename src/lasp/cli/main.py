"""The `lasp` command: picks the subcommand and turns errors meant for the user into one message and a code."""

import importlib
import sys
from collections.abc import Callable, Sequence

# Subcommand -> what it does. Each has a module of that name with `main(arguments) -> exit code`; modules are
# imported when asked for, so that help and usage errors do not wait for PyTorch.
COMMANDS = {
    "train": "train a model; alone, `lasp train` starts its own processes, under torchrun it joins them",
    "data": "tokenise text, JSONL or parquet into shards that `lasp train --data.path` reads",
    "generate": "continue a prompt with a trained model",
    "export": "write a trained model's weights as one safetensors file and its configuration",
    "verify": "check every checkpoint of a run against its manifest",
    "check": "compare a model split over processes with the same model in one",
    "plan": "predict memory, speed and the longest sequence of a run, by method and layout",
    "report": "write one HTML page about a run",
    "bench": "time every way of carrying the state between processes, or training steps on any layout",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lasp ARGUMENTS` and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 64
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("lasp-torch"))
        return 0
    if arguments[0] not in COMMANDS:
        print(f"lasp: no command {arguments[0]!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 64
    command: Callable[[list[str]], int] = importlib.import_module(f"lasp.cli.{arguments[0]}").main
    return guarded(lambda: command(arguments[1:]))


def guarded(command: Callable[[], int]) -> int:
    """Run a command; print errors that are meant for the user without a traceback, and return their code."""
    from lasp.data.errors import DataError
    from lasp.train.errors import DATA_EXIT_CODE, RunError
    from lasp.train.outlet import printable

    try:
        return command()
    except RunError as error:
        print(printable(f"lasp: {error}"), file=sys.stderr)
        return error.exit_code
    except DataError as error:
        print(printable(f"lasp: {error}"), file=sys.stderr)
        return DATA_EXIT_CODE
    except KeyboardInterrupt:
        print("lasp: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lasp COMMAND [OPTIONS]      (lasp COMMAND --help lists the options)",
            "",
            "Linear attention sequence parallelism: train on sequences longer than one device holds.",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
