"""`lasp generate`: continue a prompt with a trained model, printed as it is made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from lasp.cli.options import parse
from lasp.terminal import say
from lasp.train.config import SampleOptions, check_seed, check_text
from lasp.train.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Continue a prompt with a trained model. Memory and time per token do not grow with the text."""

    path: Annotated[Path, tyro.conf.Positional]
    """Run folder of `lasp train` (its newest good checkpoint is used), one checkpoint, or folder of `lasp export`."""
    prompt: str | None = None
    """Text to continue; empty starts a new document; default: what the run's own sample began with."""
    num_tokens: int = 400
    """Tokens to generate."""
    temperature: float = 0.8
    """0 takes the likeliest token every time."""
    top_k: int | None = 50
    """Draw among so many likeliest tokens only."""
    seed: int = 0
    """The same seed gives the same text."""


def main(arguments: Sequence[str]) -> int:
    """Run `lasp generate ARGUMENTS`."""
    options = parse(GenerateArguments, arguments, "lasp generate")
    check_seed("--seed", options.seed)
    check_text("--prompt", options.prompt)
    if (
        options.num_tokens < 0
        or not 0 <= options.temperature < math.inf
        or (options.top_k is not None and options.top_k < 1)
    ):
        raise ConfigError(
            "--num-tokens and --temperature must not be negative, nor infinite, and --top-k must be at least 1, got "
            f"{options.num_tokens}, {options.temperature} and {options.top_k}"
        )
    from lasp.train.sample import load, stream_text

    loaded = load(options.path, report=partial(say, error=True))
    sample = SampleOptions(
        prompt=loaded.prompt if options.prompt is None else options.prompt,
        num_tokens=options.num_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
    )
    device = next(loaded.model.parameters()).device
    for piece in stream_text(loaded.model, loaded.tokenizer, sample, seed=options.seed, device=device):
        say(piece, end="")
    say()
    return 0
