"""Checks of what the functions of lasp.data take, before a file is read: DataError, which names the argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lasp.errors import DataError

ON_BAD_RECORD = ("stop", "skip")
VERIFY = ("changed", "full")


def check(name: str, value: object, is_good: bool, expected: str) -> None:
    """Raise DataError for an argument that is not as it must be."""
    if not is_good:
        raise DataError(f"{name} must be {expected}, got {value!r}")


def check_whole(name: str, value: Any, least: int | None) -> None:
    """Raise DataError unless it is a whole number, and at least so large."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    expected = "a whole number" if least is None else f"a whole number >= {least}"
    check(name, value, is_whole and (least is None or value >= least), expected)


def check_path(name: str, value: object, *, or_none: bool = False) -> None:
    """Raise DataError unless it is a Path, or None where that is allowed."""
    good = isinstance(value, Path) or (or_none and value is None)
    check(name, value, good, "a pathlib.Path or None" if or_none else "a pathlib.Path")


def check_tokenizer(tokenizer: object) -> None:
    """Raise DataError unless it has what `lasp.data.tokenizer.Tokenizer` has."""
    wanted = ("name", "vocab_size", "separator", "encode", "encode_blocks", "decode_stream")
    check("tokenizer", tokenizer, all(hasattr(tokenizer, name) for name in wanted), "a Tokenizer")


def check_text(
    suffixes: Any, field: Any, validation_fraction: Any, seed: Any, validation_path: Any, on_bad_record: Any
) -> None:
    """Raise DataError for an argument that says nothing of which text to read, and how."""
    words = isinstance(suffixes, tuple) and all(isinstance(suffix, str) for suffix in suffixes)
    check("suffixes", suffixes, words, "a tuple of endings, such as ('.txt',)")
    check("field", field, isinstance(field, str), "the name of a field")
    is_number = isinstance(validation_fraction, (int, float)) and not isinstance(validation_fraction, bool)
    within = is_number and 0 < validation_fraction < 1
    check("validation_fraction", validation_fraction, within, "a number between 0 and 1")
    check_whole("seed", seed, None)
    check_path("validation_path", validation_path, or_none=True)
    known = isinstance(on_bad_record, str) and on_bad_record in ON_BAD_RECORD
    check("on_bad_record", on_bad_record, known, " or ".join(ON_BAD_RECORD))
