"""`lasp data build`: text to token shards."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from lasp.data import store
from lasp.data.build import SHARD_TOKENS
from lasp.data.tokenizer import load_tokenizer
from lasp.train.config import DataOptions
from lasp.train.errors import ConfigError
from lasp.train.output import bytes_text, duration

_DEFAULTS = DataOptions()


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Tokenise a folder once into memory-mapped shards, for `lasp train --data.path OUTPUT`.

    Memory does not grow with the text. OUTPUT appears when it is whole; a build that ends early leaves nothing.
    """

    output: Path
    """Folder to make; must not exist."""
    path: Path | None = None
    """Folder of text, JSONL and parquet files; default: the Python standard library's own source."""
    suffixes: tuple[str, ...] = _DEFAULTS.suffixes
    """File name endings to read. A text file is a document; a JSONL line or parquet row (extra `parquet`) is one."""
    field: str = _DEFAULTS.field
    """Which field of a JSONL or parquet record is the text."""
    tokenizer: str = "bytes"
    """"bytes", or the path of a `tokenizers` JSON file (extra `hf`)."""
    validation_fraction: float = _DEFAULTS.validation_fraction
    """Share of documents held out for validation."""
    seed: int = _DEFAULTS.seed
    """Order of the files."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens of a shard file."""


def main(arguments: Sequence[str]) -> int:
    """Run `lasp data ARGUMENTS`."""
    if not arguments or arguments[0] != "build":
        if arguments and arguments[0] in ("-h", "--help"):
            arguments = ["build", "--help"]
        else:
            raise ConfigError("usage: lasp data build --path FOLDER --output FOLDER; lasp data build --help lists all")
    options = tyro.cli(BuildOptions, args=list(arguments[1:]), prog="lasp data build")
    if options.shard_tokens < 1:
        raise ConfigError(f"--shard-tokens must be at least 1, got {options.shard_tokens}")
    if not 0 < options.validation_fraction < 1:
        raise ConfigError(f"--validation-fraction must be above 0 and below 1, got {options.validation_fraction}")
    console, began = Console(highlight=False, soft_wrap=True), time.monotonic()
    with console.status("reading") as status:

        def progress(num_bytes: int, num_tokens: int) -> None:
            speed = bytes_text(num_bytes / max(time.monotonic() - began, 1e-3))
            status.update(f"{bytes_text(num_bytes)} of text, {num_tokens:,} tokens, {speed}/s")

        built = store.build(
            options.output,
            folder=options.path,
            suffixes=options.suffixes,
            field=options.field,
            tokenizer=load_tokenizer(options.tokenizer),
            validation_fraction=options.validation_fraction,
            seed=options.seed,
            shard_tokens=options.shard_tokens,
            progress=progress,
        )
    for split, stream in (("train", built.train), ("validation", built.validation)):
        console.print(
            f"{split}: {len(stream):,} tokens of {built.num_documents[split]:,} documents "
            f"({bytes_text(built.num_bytes[split])}) in {len(stream.files)} shards",
            markup=False,
        )
    console.print(f"{duration(time.monotonic() - began)}; train on it: lasp train --data.path {options.output}")
    return 0
