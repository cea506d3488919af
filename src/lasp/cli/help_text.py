"""Reads the text of `lasp COMMAND --help` from the program itself: for shell completion and its reference."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Every command line with options of its own.
COMMAND_LINES: tuple[tuple[str, ...], ...] = (
    ("train",),
    ("data", "build"),
    ("generate",),
    ("export",),
    ("verify",),
    ("check",),
    ("plan",),
    ("report",),
    ("bench", "exchange"),
    ("bench", "train"),
)
# Too narrow for two columns side by side.
_COLUMNS = "78"
# Names, what follows them, and after two spaces what is said of them if that fits into the line.
_OPTION = re.compile(r"(?:-\w, )?(?P<names>--[\w.-]+(?:, --[\w.-]+)*)(?: (?P<values>\S.*?))?(?:  +(?P<text>.*))?")
_ARGUMENT = re.compile(r"(?P<names>)(?P<values>[A-Z\[]\S*(?: \S+)*?)(?:  +(?P<text>.*))?")


class Option(NamedTuple):
    """One option: its names, what follows it, and what help says of it. A positional argument has no name."""

    names: tuple[str, ...]
    values: str
    text: str

    @property
    def usage(self) -> str:
        """The option as it is written on a command line."""
        return " ".join([", ".join(self.names), self.values]).strip()

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that may follow it, where they are few."""
        found = re.search(r"\{([^{}|]+)\}", self.values)
        return tuple(word for word in found[1].split(",") if word != "None") if found else ()


class Help(NamedTuple):
    """A command's description, a paragraph each, and its options."""

    description: list[str]
    options: list[Option]


def help_of(command: Sequence[str]) -> Help:
    """Ask `lasp COMMAND --help`. Raises ValueError if it does not say how to call it."""
    from lasp.cli.main import main

    told = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with _narrow(), contextlib.redirect_stdout(told):
        code = main([*command, "--help"])
    told.seek(0)
    text = told.read()
    if code != 0 or not text.startswith("usage:"):
        raise ValueError(f"lasp {' '.join(command)} --help ended with exit code {code} and said {text[:200]!r}")
    return _read(text)


def _read(text: str) -> Help:
    before, _, _ = text.partition("╭")
    paragraphs = [" ".join(part.split()) for part in before.split("\n\n")[1:]]
    options: list[Option] = []
    pattern = _OPTION
    for line in text.splitlines():
        if line.startswith("╭"):  # the title of a group
            pattern = _ARGUMENT if "positional" in line else _OPTION
        content = line[2:].rstrip("│").rstrip()
        if not line.startswith("│ ") or content.startswith("─"):
            continue
        last = options[-1] if options else None
        named = pattern.fullmatch(content)
        if named is not None:  # names stand at the margin, what is said of them further in
            names = tuple(filter(None, named["names"].split(", ")))
            options.append(Option(names, named["values"] or "", named["text"] or ""))
        elif last is not None and content.startswith("  "):
            options[-1] = last._replace(text=f"{last.text} {content.strip()}".strip())
        elif last is not None and not last.text:  # a list of choices that is longer than a line
            options[-1] = last._replace(values=last.values + content)
    return Help([part for part in paragraphs if part], options)


@contextlib.contextmanager
def _narrow() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR", "TERM")}
    os.environ.update(COLUMNS=_COLUMNS, NO_COLOR="1", TERM="dumb")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
