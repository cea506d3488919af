"""`lasp export`: a trained model as one safetensors file and its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from lasp.cli.options import parse
from lasp.terminal import say


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write a trained model's weights and configuration to a folder, for `lasp train --init-from`, `lasp generate`
    and other programs.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """Run folder of `lasp train` (its newest good checkpoint is used), or one checkpoint."""
    out: Path
    """New folder."""


def main(arguments: Sequence[str]) -> int:
    """Run `lasp export ARGUMENTS`."""
    options = parse(ExportArguments, arguments, "lasp export")
    from lasp.train.export import export

    say(export(options.path, options.out, report=partial(say, error=True)))
    return 0
