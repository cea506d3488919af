"""`lasp verify`: every checkpoint of a run against its manifest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lasp.cli.arguments import parse
from lasp.errors import CheckpointError
from lasp.terminal import counted, say


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Read every checkpoint of a run and say which are good. Exit code 66 if none is."""

    path: Annotated[Path, tyro.conf.Positional]
    """Run folder of `lasp train`, or one checkpoint."""


def main(arguments: Sequence[str]) -> int:
    """Run `lasp verify ARGUMENTS`."""
    options = parse(VerifyArguments, arguments, "lasp verify")
    from lasp.train import checkpoint

    good = 0
    for folder in checkpoint.candidates(options.path):
        try:
            found = checkpoint.verify(folder)
        except CheckpointError as error:
            say(f"damaged  {error}")
            continue
        good += 1
        layout = ", ".join(f"{name} {value}" for name, value in found.state["layout"].items())
        say(f"good     {folder}: {counted(found.state['step'], 'step')}, written by {layout}")
    return 0 if good else CheckpointError.exit_code
