"""`lasp check`: is a model split over processes the same model? Loss, every gradient and generated logits say."""

import sys
from collections.abc import Sequence

from lasp.check.compare import BOUNDS, CheckConfig, run
from lasp.check.table import layer_table, table
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
    if config.hf is not None:
        from lasp.check import transformers

        report = transformers.run(config)
        good, found = report.passes, layer_table(config, report, transformers.BOUND)
    else:
        rows = run(config, broken=BREAK in arguments)
        good, found = all(row.passes(BOUNDS[config.precision]) for row in rows), table(config, rows)
    if is_first():
        console = Terminal(width=None if sys.stdout.isatty() else 140)
        console.print(found)
        verdict = "the same model." if good else "NOT the same model."
        console.print(f"The split model is {verdict}", style=None if good else "red")
    return 0 if good else 1
