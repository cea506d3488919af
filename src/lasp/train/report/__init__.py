"""One self-contained HTML page about a run: `render(load(run_folder))`."""

from lasp.train.report.page import render
from lasp.train.report.run import LoadedRun, load

__all__ = ["LoadedRun", "load", "render"]
