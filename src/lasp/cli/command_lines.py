"""Every command's options, from the parser that reads them: for shell completion and the reference."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import NamedTuple

# Every command line with options of its own, and which class of its module holds what they say.
COMMAND_LINES: dict[tuple[str, ...], str] = {
    ("train",): "TrainArguments",
    ("data", "build"): "BuildOptions",
    ("generate",): "GenerateArguments",
    ("export",): "ExportArguments",
    ("verify",): "VerifyArguments",
    ("check",): "CheckConfig",
    ("plan",): "PlanConfig",
    ("report",): "ReportArguments",
    ("bench", "exchange"): "BenchConfig",
    ("bench", "train"): "BenchTrainConfig",
}


class Option(NamedTuple):
    """One option: its names, what follows it, the words that may if they are few, and what help says of it.

    A positional argument has no name.
    """

    names: tuple[str, ...]
    values: str
    choices: tuple[str, ...]
    text: str

    @property
    def usage(self) -> str:
        """The option as it is written on a command line."""
        return " ".join([", ".join(self.names), self.values]).strip()


class CommandLine(NamedTuple):
    """A command's description, a paragraph each, and its options."""

    description: list[str]
    options: list[Option]


def command_line(command: Sequence[str]) -> CommandLine:
    """Parser of `lasp COMMAND`. Raises ValueError for a command that has no options of its own."""
    import tyro.extras

    name = COMMAND_LINES.get(tuple(command))
    if name is None:
        known = ", ".join(" ".join(line) for line in COMMAND_LINES)
        raise ValueError(f"lasp {' '.join(command)} has no options of its own; commands that have: {known}")
    kind = getattr(importlib.import_module(f"lasp.cli.{command[0]}"), name)
    with warnings.catch_warnings():
        # tyro has no other way to look at a parser. It calls this one deprecated: hence tyro's next major version is
        # left out in pyproject.toml.
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(kind, prog=f"lasp {' '.join(command)}")
    options = [
        Option(
            tuple(name for name in action.option_strings if name.startswith("--")),
            action.metavar if isinstance(action.metavar, str) else "",
            tuple(action.choices or ()),
            " ".join((action.help or "").split()),
        )
        for action in parser._actions
    ]
    paragraphs = [" ".join(part.split()) for part in (parser.description or "").split("\n\n")]
    return CommandLine([part for part in paragraphs if part], options)
