"""The `lasp` command: picks the subcommand and turns errors meant for the user into one message and a code.

Nothing slow is imported before the guard stands: Ctrl-C while PyTorch is loaded is an interruption like any other.
"""

import contextlib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from lasp.errors import FILES_EXIT_CODE, INTERRUPTED_EXIT_CODE, ConfigError, RunError

# With this variable set, the errors that are one message come with their traceback too.
_TRACEBACK = "LASP_TRACEBACK"

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
    "completion": "print a script that completes all this in bash, zsh or fish",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lasp ARGUMENTS` and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _run(given))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print(_usage())
        return 0 if arguments else ConfigError.exit_code
    if arguments[0] in ("-V", "--version"):
        from lasp.cli.versions import versions

        _print(versions())
        return 0
    if arguments[0] not in COMMANDS:
        raise ConfigError(f"no command {arguments[0]!r}; known: {', '.join(COMMANDS)}")
    if "LASP_LIFELINE" in os.environ:  # `lasp` has started this process
        from lasp.distributed.launcher import follow

        follow()
    command: Callable[[list[str]], int] = importlib.import_module(f"lasp.cli.{arguments[0]}").main
    return command(arguments[1:])


def guarded(command: Callable[[], int]) -> int:
    """Run a command and return its exit code: whatever a user can cause is one message, without a traceback.

    Anything else is a fault of the program: its traceback is printed, and it is called that.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that a terminal cannot show is shown by its number
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command()
        sys.stdout.flush()
        return code
    except SystemExit as end:  # of the parser of options, which has said why: 2 for what it did not understand
        return ConfigError.exit_code if end.code == 2 else int(end.code or 0)
    except BrokenPipeError as error:  # whoever read the output is gone, as in `lasp verify RUN | head -1`
        with contextlib.suppress(OSError):  # or Python would write the rest at its end, and fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _say("nobody reads the output any more", FILES_EXIT_CODE, error)
    except (Exception, KeyboardInterrupt) as error:
        known = _for_users(error)
        if known is not None:
            return _say(*known, error)
        _print(traceback.format_exc(), error=True)
        return _say("this is a fault of lasp, not of how it was called: please report it with the lines above", 1)


def _for_users(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code of an error that a user can cause or mend; None for faults of the program."""
    if isinstance(error, RunError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED_EXIT_CODE
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("lasp"):
        return f"the Python package {error.name} is not installed: pip install {error.name}", ConfigError.exit_code
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([" -> ".join(named) or "a file", error.strerror or str(error)]), FILES_EXIT_CODE
    # PyTorch has a class for a GPU's memory, and for the host's a sentence only.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return f"out of memory: {error}", 1
    return None


def _say(message: str, code: int, error: BaseException | None = None) -> int:
    with contextlib.suppress(OSError):
        if error is not None and os.environ.get(_TRACEBACK):
            _print("".join(traceback.format_exception(error)), error=True)
        _print(f"lasp: {message}", error=True)
    return code


def _print(text: str, *, error: bool = False) -> None:
    from lasp.terminal import say  # brings rich

    say(text, error=error)


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
