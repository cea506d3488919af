"""Token shards built from text for `lasp train --data.path`, with progress on a terminal."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.status import Status

from lasp.data import store
from lasp.data.build import SHARD_TOKENS
from lasp.data.tokenizer import load_tokenizer
from lasp.errors import ConfigError
from lasp.terminal import Terminal, counted
from lasp.train.config import DataOptions
from lasp.train.logging.output import bytes_text, duration
from lasp.train.logging.program import lasp_command
from lasp.train.sizes import Tokens

_DEFAULTS = DataOptions()
# Seconds between two reports of progress: on a terminal, where one takes the other's place, and elsewhere.
_REFRESH_S, _LINE_S = 0.2, 30.0


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Tokenise text once into shards, for `lasp train --data.path OUT`.

    Memory does not grow with the text. OUT appears when it is whole; a build that ends early leaves nothing.
    """

    sources: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of text, JSONL and parquet files, or such files, read in this order; default: the Python standard
    library's own source."""
    out: Path
    """Folder to make; must not exist."""
    suffixes: tuple[str, ...] = _DEFAULTS.suffixes
    """File name endings to read. A text file is a document; a JSONL line or parquet row (extra `parquet`) is one."""
    field: str = _DEFAULTS.field
    """Which field of a JSONL or parquet record is the text."""
    tokenizer: str = "bytes"
    """"bytes", or the path of a `tokenizers` JSON file (extra `hf`)."""
    validation_fraction: float = _DEFAULTS.validation_fraction
    """Share of documents held out for validation; of too few for that, the last part of every document."""
    validation_path: Path | None = None
    """Folder or file of text to validate on; nothing of SOURCES is held out then."""
    on_bad_record: Literal["stop", "skip"] = _DEFAULTS.on_bad_record
    """A JSONL or parquet record without text: end and name it, or leave it out and count it."""
    seed: int = _DEFAULTS.seed
    """Order of the files of a folder."""
    shard_tokens: Tokens = SHARD_TOKENS
    """Tokens of a shard file; 1M is 1048576."""

    def validate(self) -> None:
        """Check every number. Raises ConfigError."""
        if self.shard_tokens < 1:
            raise ConfigError(f"--shard-tokens must be at least 1, got {self.shard_tokens}")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"--validation-fraction must be above 0 and below 1, got {self.validation_fraction}")


class _Progress:
    """Says now and then how far a build is."""

    def __init__(self, console: Terminal, status: Status) -> None:
        self._console, self._status = console, status
        self._began = self._shown = time.monotonic()

    def __call__(self, num_bytes: int, num_tokens: int) -> None:
        now = time.monotonic()
        if now - self._shown < (_REFRESH_S if self._console.is_terminal else _LINE_S):
            return
        self._shown = now
        rate = bytes_text(num_bytes / (now - self._began))
        text = f"{bytes_text(num_bytes)} of text, {num_tokens:,} tokens, {rate}/s"
        if self._console.is_terminal:
            self._status.update(text)
        else:
            self._console.print(text)


def build(options: BuildOptions, console: Terminal) -> None:
    """Builds what `options` say and prints what it read and made. Raises ConfigError."""
    options.validate()
    began = time.monotonic()
    with console.status("reading") as status:
        built = store.build(
            options.out,
            sources=options.sources,
            suffixes=options.suffixes,
            field=options.field,
            tokenizer=load_tokenizer(options.tokenizer),
            validation_fraction=options.validation_fraction,
            seed=options.seed,
            shard_tokens=options.shard_tokens,
            progress=_Progress(console, status),
            validation_path=options.validation_path,
            on_bad_record=options.on_bad_record,
        )
    console.print(built.reading.summary())
    for split, stream in (("train", built.train), ("validation", built.validation)):
        console.print(
            f"{split}: {len(stream):,} tokens of {counted(built.num_documents[split], 'document')} "
            f"({bytes_text(built.num_bytes[split])}) in {counted(len(stream.files), 'shard')}",
        )
    if len(built.validation) == 0:
        console.print("nothing is held out, and `lasp train` will ask for it: raise --validation-fraction, or add text")
    took = duration(time.monotonic() - began)
    console.print(f"{took}; train on it: {lasp_command('train', '--data.path', options.out)}")
