"""The options of a command, read one way: what is wrong with them is said once, by the first process, and printably."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from lasp.terminal import printable

C = TypeVar("C")


def is_launched() -> bool:
    """True if a launcher has started this process, which then joins the others."""
    return "RANK" in os.environ


def is_first() -> bool:
    """True if this process speaks to the user: the first of those that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def parse(kind: type[C], arguments: Sequence[str], command: str, default: C | None = None) -> C:
    """The dataclass `kind` as the arguments of `command` say; what they leave out is as in `default`.

    Names and values, as of --model.overrides, are added to those of `default`.

    Raises SystemExit on --help (0) and for what cannot be understood (2), which has then been printed.
    """
    speaks = is_first()
    given, shown = list(arguments), [printable(argument) for argument in arguments]
    # Of names that are there tyro would make options, and take no others.
    more: dict[str, Any] = {} if default is None else {"default": _emptied(default)}
    try:
        # tyro repeats what it does not understand as it was given.
        found = tyro.cli(kind, args=given, prog=command, console_outputs=speaks and given == shown, **more)
        return found if default is None else _filled(found, default)
    except SystemExit:
        if speaks and given != shown:
            tyro.cli(kind, args=shown, prog=command, **more)
        raise


def _emptied(options: Any) -> Any:
    """The dataclass without what its dictionaries, and those of dataclasses in it, hold."""
    changes = {
        field.name: {} if isinstance(value, dict) else _emptied(value)
        for field, value in _fields(options)
        if isinstance(value, dict) or dataclasses.is_dataclass(value)
    }
    return dataclasses.replace(options, **changes)


def _filled(options: Any, default: Any) -> Any:
    """The dataclass whose dictionaries hold what those of `default` do, but for what they say themselves."""
    before = {field.name: value for field, value in _fields(default)}
    changes: dict[str, Any] = {}
    for field, value in _fields(options):
        earlier = before.get(field.name)
        if isinstance(value, dict) and isinstance(earlier, dict):
            changes[field.name] = earlier | value
        elif dataclasses.is_dataclass(value) and dataclasses.is_dataclass(earlier):
            changes[field.name] = _filled(value, earlier)
    return dataclasses.replace(options, **changes)


def _fields(options: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    return [(field, getattr(options, field.name)) for field in dataclasses.fields(options) if field.init]


def early(arguments: Sequence[str], *names: str) -> list[Path | None]:
    """The values of some options, before all are read: of those that the defaults of others hang on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(name, type=Path)
    try:
        known, _ = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError:  # an option without its value: the full parser says it better
        return [None] * len(names)
    return [getattr(known, name.lstrip("-").replace("-", "_")) for name in names]
