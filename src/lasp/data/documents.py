"""Documents out of files: a text file is one, a line of JSONL or a row of parquet is one. Read a piece at a time.

A text file's side of the validation split depends on its path alone, a record's on its text alone: adding one moves
no other, and copies of a record are never on both sides.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

from lasp import files
from lasp.data.corpus import TextFile, held_out
from lasp.data.errors import DataError

_BLOCK_BYTES = 1 << 20
JSONL = (".jsonl", ".jsonl.gz")
PARQUET = (".parquet",)


class Document(NamedTuple):
    """One text."""

    name: str
    """For messages: the file, and the record in it."""
    split: str
    """"train" or "validation"."""
    blocks: Iterable[bytes]
    """The text in pieces, UTF-8; to be read once, before the next document."""


def documents_of(file: TextFile, field: str, validation_fraction: float) -> Iterator[Document]:
    """The documents of one file. field: which one of a record is the text. Raises DataError naming the record."""
    if not is_records(file.path):
        yield Document(file.name, _split(f"split:{file.name}", validation_fraction), _blocks(file.path))
        return
    records = _jsonl(file.path) if file.path.name.endswith(JSONL) else _parquet(file.path, field)
    for number, record in enumerate(records, start=1):
        name = f"{file.name}, record {number}"
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{name}: no text in the field {field!r} (found: {fields}): name it with --field")
        yield Document(name, _split(f"text:{text}", validation_fraction), [text.encode("utf-8", "replace")])


def is_records(path: Path) -> bool:
    """Whether the file holds many documents."""
    return path.name.endswith((*JSONL, *PARQUET))


def _split(key: str, validation_fraction: float) -> str:
    return "validation" if held_out(key, validation_fraction) else "train"


def _blocks(path: Path) -> Iterator[bytes]:
    with files.open_regular(path, follow=True) as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


def _jsonl(path: Path) -> Iterator[Any]:
    with files.open_regular(path, follow=True) as file, _unpacked(file, path) as stream:
        number = 0
        try:
            for line in stream:
                number += 1
                if line.strip():
                    yield json.loads(line)
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"cannot read {path} at line {number}: {error}") from error


def _unpacked(file: BinaryIO, path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file, "rb")) if path.name.endswith(".gz") else file


def _parquet(path: Path, field: str) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs the `pyarrow` package: pip install 'lasp-torch[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                found = ", ".join(table.schema_arrow.names)
                raise DataError(f"{path} has no column {field!r} (found: {found}): name it with --field")
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error
