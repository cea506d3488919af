"""`lasp report`: one HTML page about a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lasp import files
from lasp.cli.checks import check_target
from lasp.cli.options import parse
from lasp.terminal import say
from lasp.train.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Write one HTML page about a run, finished or going on: curves, layout, time, memory, bytes, text, settings.

    The page refers to nothing outside itself: it can be mailed, and read offline.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `lasp train`."""
    out: Path | None = None
    """File to write; default: report.html in the run folder."""


def main(arguments: Sequence[str]) -> int:
    """Run `lasp report ARGUMENTS`."""
    options = parse(ReportArguments, arguments, "lasp report")
    out = options.out or options.run / "report.html"
    from lasp.train.report import load, render

    try:
        run = load(options.run)
        check_target("--out", out)
        page = render(run)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{options.run} holds files that are damaged, or of another version of lasp train: {error!r}"
        ) from error
    files.write_output(out, page)
    say(out)
    return 0
