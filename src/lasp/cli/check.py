"""`lasp check`: is a model split over processes the same model? Loss, every gradient and generated logits say."""

import sys
from collections.abc import Sequence

from lasp.check.compare import BOUNDS, CheckConfig, run
from lasp.check.table import table
from lasp.cli.arguments import is_first, is_launched, parse
from lasp.distributed import launcher
from lasp.terminal import Terminal

# Not in --help: makes every exchange forget the state it carries, to show that the check can fail.
BREAK = "--break-exchange"


def main(arguments: Sequence[str]) -> int:
    """Run `lasp check ARGUMENTS`."""
    config = parse(CheckConfig, [argument for argument in arguments if argument != BREAK], "lasp check")
    config.validate()
    if not is_launched():
        return launcher.launch(["check", *arguments], config.sp)
    rows = run(config, broken=BREAK in arguments)
    good = all(row.passes(BOUNDS[config.precision]) for row in rows)
    if is_first():
        console = Terminal(width=None if sys.stdout.isatty() else 140)
        console.print(table(config, rows))
        verdict = "the same model." if good else "NOT the same model."
        console.print(f"The split model is {verdict}", style=None if good else "red")
    return 0 if good else 1
