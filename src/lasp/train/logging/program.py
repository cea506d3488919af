"""Finds the words by which a user starts this program again, so that printed commands work as they are printed."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def lasp_command(*arguments: object) -> str:
    """A shell command line of `lasp` with these arguments, by the Python that runs now.

    "lasp" alone where the shell finds this very program by that name; else by its path, or `python -m lasp`.
    """
    script = Path(sys.executable).with_name("lasp")
    if _found("lasp", script):
        words = ["lasp"]
    elif script.is_file():
        words = [_short(script)]
    else:
        python = Path(sys.executable)
        words = [python.name if _found(python.name, python) else _short(python), "-m", "lasp"]
    return shlex.join([*words, *map(str, arguments)])


def _found(name: str, path: Path) -> bool:
    """True if the shell finds `path` by `name`. Not by what a link leads to: that makes a virtual environment."""
    found = shutil.which(name)
    return found is not None and os.path.abspath(found) == os.path.abspath(path)


def _short(path: Path) -> str:
    """`path` from here, where it is below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
