"""`lasp export`: a trained model as one safetensors file and its configuration."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lasp.train.outlet import printable


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
    options = tyro.cli(ExportArguments, args=list(arguments), prog="lasp export")
    from lasp.train.export import export

    print(
        printable(str(export(options.path, options.out, report=lambda text: print(printable(text), file=sys.stderr))))
    )
    return 0
