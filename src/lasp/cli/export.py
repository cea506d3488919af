"""`lasp export`: a trained model as one safetensors file and its configuration, or as a folder of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lasp.cli.arguments import parse
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
    format: Literal["lasp", "transformers"] = "lasp"
    """"transformers": a folder for AutoModelForCausalLM, of the models that it has too, which are those of the family
    mamba2."""


def main(arguments: Sequence[str]) -> int:
    """Run `lasp export ARGUMENTS`."""
    options = parse(ExportArguments, arguments, "lasp export")
    from lasp.train.checkpoint.export import export

    report = partial(say, error=True)
    say(export(options.path, options.out, report=report, for_transformers=options.format == "transformers"))
    return 0
