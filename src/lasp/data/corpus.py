"""Which files are the text, in which order, and which of them are held out for validation.

The default text is the Python standard library of the running interpreter: it is on every machine that can run
this package, it is real text with long documents, and nothing is downloaded. Left out of it are
  - installed packages, which differ from machine to machine,
  - the interpreter's own tests: several distributions package them apart, so the text would differ, and they
    hold files that are broken on purpose,
  - `encodings` and `pydoc_data`: tables and help pages written by a program, which flatter or swamp a score.

A document's place in the order and its side of the split depend on its path alone, so adding a file moves no
other file from training to validation.
"""

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

from lasp.data.errors import DataError

STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
)


class Document(NamedTuple):
    """One text file."""

    name: str
    """Path below the corpus folder, with forward slashes."""
    path: Path
    split: str
    """"train" or "validation"."""


def find_documents(
    folder: Path | None, suffixes: tuple[str, ...], validation_fraction: float, seed: int
) -> list[Document]:
    """Every text file below `folder`, in the corpus' fixed order.

    folder: searched recursively; None is the standard library of the running interpreter (`*.py`).
    suffixes: file name endings that count as text, such as ".txt".
    validation_fraction: the share of documents (not of bytes) to hold out, in (0, 1).
    seed: chooses the order. Hidden files and folders and links to folders are not followed.

    Raises DataError if there is no such folder or no such file.
    """
    if folder is None:
        root, suffixes, left_out = Path(sysconfig.get_path("stdlib")), (".py",), STDLIB_LEFT_OUT
    else:
        root, left_out = folder, frozenset()
    if not root.is_dir():
        raise DataError(f"the text must be a folder of files, but {root} is not a folder")
    documents, other_suffixes = [], set()
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in left_out and not name.startswith("."))
        for file in sorted(files):
            if file.startswith("."):
                continue
            if not file.endswith(suffixes):
                other_suffixes.add(Path(file).suffix)
                continue
            path = Path(parent) / file
            name = path.relative_to(root).as_posix()
            held_out = _unit_interval(f"split:{name}") < validation_fraction
            documents.append(Document(name, path, "validation" if held_out else "train"))
    if not documents:
        found = ", ".join(sorted(other_suffixes - {""})[:12]) or "no files at all"
        raise DataError(
            f"no file below {root} ends in {', '.join(suffixes)} (found: {found}): "
            "name the endings to read with --data.suffixes"
        )
    return sorted(documents, key=lambda document: (_unit_interval(f"{seed}:{document.name}"), document.name))


def _unit_interval(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine and Python."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
