"""Docstrings here are plain text with `code` between backticks; this makes them reStructuredText that says the same."""

from __future__ import annotations

import inspect
import re
from typing import Any

# Signs that reStructuredText would read as markup; between backticks nothing is.
_MARKUP = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")
_CODE = re.compile(r"(`[^`]+`)")


def as_restructured(line: str) -> str:
    """A line with its code marked as such and all other signs escaped."""
    parts = _CODE.split(line)
    return "".join(f"`{part}`" if _CODE.fullmatch(part) else _MARKUP.sub(r"\\\1", part) for part in parts)


def with_arguments(lines: list[str], names: set[str]) -> list[str]:
    """Paragraphs that begin with `name: ` of a parameter, as the section `Args:` that they are."""
    found: list[str] = []
    starts = re.compile(r"(\w+(?:, \w+)*): \S")
    inside = False
    for number, line in enumerate(lines):
        begins = number == 0 or not lines[number - 1].strip()
        match = starts.match(line)
        if begins and match and set(match[1].split(", ")) <= names:
            found.append("Args:")
            inside = True
        elif begins and line and not line.startswith(" "):
            inside = False
        found.append(f"    {line}" if inside and line.strip() else line)
    return found


def _parameters(obj: Any) -> set[str]:
    try:
        return set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return set()


def _convert(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    # A code span may go on in the next line: joined with a mark that no docstring holds, they are one text.
    lines[:] = as_restructured("\n".join(with_arguments(lines, _parameters(obj)))).split("\n")


def setup(app: Any) -> dict[str, Any]:
    """Before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", _convert, priority=100)
    return {"parallel_read_safe": True}
