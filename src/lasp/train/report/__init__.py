"""One self-contained HTML page about a run: `render(load(run_folder))`."""

from lasp.train.report.page import render
from lasp.train.report.run import Run, load

__all__ = ["Run", "load", "render"]
