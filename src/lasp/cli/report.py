"""`lasp report`: one HTML page about a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lasp import files
from lasp.train.errors import ConfigError
from lasp.train.outlet import printable


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write one HTML page about a run, finished or going on: curves, layout, time, memory, bytes, text, settings.

    The page refers to nothing outside itself: it can be mailed, and read offline.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `lasp train`."""
    out: Path | None = None
    """File to write; default: report.html in the run folder."""


def main(arguments: Sequence[str]) -> int:
    """Run `lasp report ARGUMENTS`."""
    options = tyro.cli(Arguments, args=list(arguments), prog="lasp report")
    out = options.out or options.run / "report.html"
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {out} does not exist")
    from lasp.train.report import load, render

    files.write(out, render(load(options.run)))
    print(printable(str(out)))
    return 0
