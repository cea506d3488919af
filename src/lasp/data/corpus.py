"""Chooses the files that are the text, and their order.

The default text is the Python standard library of the running interpreter: it is on every machine that can run
this package, it is real text with long documents, and nothing is downloaded. Left out of it are
  - installed packages, which differ from machine to machine,
  - the interpreter's own tests: several distributions package them apart, so the text would differ, and they
    hold files that are broken on purpose,
  - `encodings` and `pydoc_data`: tables and help pages written by a program, which flatter or swamp a score.

A file's place in the order depends on its path alone.
"""

import hashlib
import os
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lasp.errors import DataError

STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
)


class TextFile(NamedTuple):
    """A file with text in it."""

    name: str
    """Path below the corpus folder, with forward slashes."""
    path: Path


class Found(NamedTuple):
    """Text files of a folder, and those of other kinds."""

    files: list[TextFile]
    left_out: Counter[str]
    """How many files are not read, by the ending of their name."""


def find_files(source: Path | None, suffixes: tuple[str, ...], seed: int) -> list[TextFile]:
    """The files of `search`."""
    return search(source, suffixes, seed).files


def search(source: Path | None, suffixes: tuple[str, ...], seed: int) -> Found:
    """Every text file below the folder `source`, in the corpus' fixed order, or the file `source`.

    source: a folder is searched recursively; None is the standard library of the running interpreter (`*.py`).
    suffixes: file name endings to read, such as ".txt", in upper or lower case.
    seed: chooses the order. Hidden files and folders and links to folders are not followed.

    Raises DataError if there is no such source, or no file to read in it.
    """
    if source is None:
        root, suffixes, not_searched = Path(sysconfig.get_path("stdlib")), (".py",), STDLIB_LEFT_OUT
    else:
        root, not_searched = source, frozenset()
    suffixes = tuple(suffix.lower() for suffix in suffixes)
    if root.is_file() and root.name.lower().endswith(suffixes):
        return Found([TextFile(root.name, root)], Counter())
    if not root.is_dir():
        raise DataError(f"{root} is not a folder of text, nor a file that ends in {', '.join(suffixes)}")
    found_files, left_out = [], Counter[str]()
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in not_searched and not name.startswith("."))
        for file in sorted(files):
            if file.startswith("."):
                continue
            if not file.lower().endswith(suffixes):
                left_out[Path(file).suffix] += source is not None
                continue
            path = Path(parent) / file
            name = path.relative_to(root).as_posix()
            found_files.append(TextFile(name, path))
    if not found_files:
        found = ", ".join(sorted(left_out.keys() - {""})[:12]) or "no files at all"
        raise DataError(
            f"no file below {root} ends in {', '.join(suffixes)} (found: {found}): "
            "name the endings to read with --data.suffixes (lasp data build: --suffixes)"
        )
    return Found(sorted(found_files, key=lambda file: (unit_interval(f"{seed}:{file.name}"), file.name)), left_out)


def unit_interval(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine and Python."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
