"""`lasp plan`: what fits where, how fast, and which layout to take, before any device is rented."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from lasp.analysis.plan_plot import plot
from lasp.analysis.plan_text import show
from lasp.analysis.report import curves, plan
from lasp.cli.arguments import parse
from lasp.terminal import Terminal, say
from lasp.train.planning import PlanConfig, command_of, job_of
from lasp.train.preflight import check_picture
from lasp.train.settings_file import load_toml


def main(arguments: Sequence[str]) -> int:
    """Run `lasp plan ARGUMENTS`."""
    config = parse(PlanConfig, arguments, "lasp plan")
    run = None if config.config is None else load_toml(config.config)
    job, name = job_of(config, run)
    check_picture("--plot", config.plot)
    compiled = config.compile or (run is not None and run.parallel.compile)
    found = {"model": name, **plan(job, compiled=compiled)}
    found["command"] = command_of(config, run, found)
    if config.plot is not None:
        plot(found, curves(job), config.plot)
    if config.json:
        say(json.dumps(found, indent=1))
    else:
        show(found, Terminal(file=sys.stdout, width=None if sys.stdout.isatty() else 160))
    return 0
