"""Documents out of files: a text file is one, a line of JSONL or a row of parquet is one. Read a piece at a time.

A text file's side of the validation split depends on its path alone, a record's on its text alone: adding one moves
no other, and copies of a record are never on both sides. Where that puts all documents on one side, `choose_split`
says what is held out instead: where they are few, the last part of each.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

from lasp import files
from lasp.data.corpus import TextFile, unit_interval
from lasp.errors import DataError
from lasp.terminal import counted

_BLOCK_BYTES = 1 << 20
# A file is cut at the end of a line, if one ends so soon.
_LINE_BYTES = 1 << 12
JSONL = (".jsonl", ".jsonl.gz")
PARQUET = (".parquet",)
SPLITS = ("train", "validation")


class Document(NamedTuple):
    """One text."""

    name: str
    """For messages: the file, and the record in it."""
    split: str
    """"train" or "validation"."""
    blocks: Iterable[bytes]
    """The text in pieces, UTF-8; to be read once, before the next document."""
    key: str = ""
    """What its side of the split is a hash of."""
    altered: bool = False
    """The text is not quite that of the file, which is no Unicode."""
    is_rest: bool = False
    """The end of the document before, which was cut in two."""


@dataclass
class Reading:
    """Counts of the documents read, by what became of them."""

    read: int = 0
    """With text in them."""
    empty: int = 0
    skipped: int = 0
    """Records without text, left out on request."""
    altered: int = 0
    """Whose tokens do not give back the text of the file: not Unicode, or unknown to the tokenizer."""
    cut: int = 0
    """In two, the second part held out."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Files whose names have another ending, by it."""
    first_skipped: str | None = None

    def leave_out(self, endings: Mapping[str, int]) -> None:
        """Add to `left_out`."""
        self.left_out = dict(Counter(self.left_out) + Counter(endings))

    def summary(self) -> str:
        """One line for the user."""
        counts = ", ".join(f"{getattr(self, name):,} {name}" for name in ("empty", "skipped", "altered", "cut"))
        line = f"{counted(self.read, 'document')} read, {counts}"
        if self.first_skipped is not None:
            line += f"; first skipped: {self.first_skipped}"
        if self.left_out:
            endings = ", ".join(sorted(ending or "none" for ending in self.left_out)[:8])
            line += f"; {counted(sum(self.left_out.values()), 'file')} left out by their endings ({endings})"
        return line


@dataclass(frozen=True, kw_only=True)
class Split:
    """A rule that puts each document on the side of training or of validation."""

    fraction: float
    """Share held out."""
    rule: str = "hash"
    """"hash": of the document's path or text; "cut": the last part of every document is held out; or one of SPLITS,
    which all are on."""

    def of(self, key: str) -> str:
        if self.rule in SPLITS:
            return self.rule
        return "validation" if self.rule == "hash" and unit_interval(key) < self.fraction else "train"


def documents_of(
    file: TextFile, field: str, split: Split | float, *, skip_bad: bool = False, reading: Reading | None = None
) -> Iterator[Document]:
    """The documents of one file.

    field: which one of a record is the text. split: or the fraction held out by hash. skip_bad: leave records without
    text out and count them in `reading`. Raises DataError naming file and line.
    """
    split = split if isinstance(split, Split) else Split(fraction=split)
    reading = Reading() if reading is None else reading
    if not is_records(file.path):
        key = f"split:{file.name}"
        whole = Document(file.name, split.of(key), _blocks(file.path, 0, None), key)
        place = _cut_of_file(file.path, split.fraction) if split.rule == "cut" else 0
        if place == 0:
            yield whole
            return
        reading.cut += 1
        yield whole._replace(blocks=_blocks(file.path, 0, place))
        yield whole._replace(split="validation", blocks=_blocks(file.path, place, None), is_rest=True)
        return
    records = _jsonl(file.path, field) if file.path.name.lower().endswith(JSONL) else _parquet(file.path, field)
    for name, text, problem in records:
        if text is None:
            if not skip_bad:
                raise DataError(f"{name}: {problem} (--on-bad-record skip leaves such records out and counts them)")
            reading.skipped += 1
            reading.first_skipped = reading.first_skipped or f"{name}: {problem}"
            continue
        clean = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        key = f"text:{clean}"
        whole = Document(name, split.of(key), [clean.encode()], key, altered=clean != text)
        place = len(clean) - max(1, round(split.fraction * len(clean))) if split.rule == "cut" else 0
        if place <= 0:
            yield whole
            continue
        reading.cut += 1
        yield whole._replace(blocks=[clean[:place].encode()])
        yield whole._replace(split="validation", blocks=[clean[place:].encode()], is_rest=True)


def choose_split(files: Iterable[TextFile], field: str, fraction: float, *, skip_bad: bool) -> Split:
    """Choose a split by hash where that puts documents on both sides; reads no more than what it takes to see it.

    Else, of so many documents that `fraction` of them is at least one, the one whose hash is nearest is held out, with
    its copies; of fewer the last part of every one.
    """
    count, lowest, highest = 0, list[float](), 0.0
    for file in files:
        for document in documents_of(file, field, fraction, skip_bad=skip_bad):
            if document.blocks == [b""] or (not is_records(file.path) and file.path.stat().st_size == 0):
                continue
            place = unit_interval(document.key)
            count, lowest, highest = count + 1, sorted({*lowest, place})[:2], max(highest, place)
            if lowest[0] < fraction <= highest:
                return Split(fraction=fraction)
    if count * fraction >= 1 and len(lowest) == 2:
        return Split(fraction=sum(lowest) / 2)
    return Split(fraction=fraction, rule="cut")


def is_records(path: Path) -> bool:
    """True if the file holds many documents."""
    return path.name.lower().endswith((*JSONL, *PARQUET))


def _cut_of_file(path: Path, fraction: float) -> int:
    """Byte where the last `fraction` of a file begins, a line or at least a character; 0 if the file is too short."""
    size = path.stat().st_size
    place = size - max(1, round(fraction * size))
    if place <= 0:
        return 0
    with files.open_regular(path, follow=True) as stream:
        stream.seek(place)
        after = stream.read(min(_LINE_BYTES, size - place))
    line = after.find(b"\n") + 1
    if 0 < line < len(after):
        return place + line
    rest = after.lstrip(bytes(range(0x80, 0xC0)))  # the inner bytes of a character
    return place + len(after) - len(rest) if rest else 0


def _blocks(path: Path, start: int, end: int | None) -> Iterator[bytes]:
    with files.open_regular(path, follow=True) as stream:
        stream.seek(start)
        left = path.stat().st_size - start if end is None else end - start
        while left > 0 and (block := stream.read(min(left, _BLOCK_BYTES))):
            left -= len(block)
            yield block


class _Record(NamedTuple):
    name: str
    text: str | None
    problem: str = ""
    """Why there is no text."""


def _record(name: str, value: Any, field: str) -> _Record:
    if not isinstance(value, dict):
        return _Record(name, None, f"no record with fields but {_kind(value)}")
    if field not in value:
        found = ", ".join(sorted(value)) or "none at all"
        return _Record(name, None, f"no field {_shown(field)!r} (found: {_shown(found)}): name it with --field")
    text = value[field]
    if not isinstance(text, str):
        return _Record(name, None, f"the field {_shown(field)!r} is {_kind(text)}, not text")
    return _Record(name, text)


def _kind(value: Any) -> str:
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _shown(text: str) -> str:
    """A name as it can be printed, also where it is no Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def _jsonl(path: Path, field: str) -> Iterator[_Record]:
    number = 0
    try:
        with files.open_regular(path, follow=True) as file, _unpacked(file, path) as stream:
            for line in stream:
                number += 1
                if not line.strip():
                    continue
                name = f"{_shown(str(path))}, line {number}"
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield _Record(name, None, f"no JSON ({error})")
                    continue
                yield _record(name, value, field)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} after line {number}: {error}") from error


def _unpacked(file: BinaryIO, path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file, "rb")) if path.name.lower().endswith(".gz") else file


def _parquet(path: Path, field: str) -> Iterator[_Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs the `pyarrow` package: pip install pyarrow") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                found = ", ".join(table.schema_arrow.names)
                raise DataError(f"{path} has no column {field!r} (found: {found}): name it with --field")
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for row in batch.to_pylist():
                    number += 1
                    yield _record(f"{_shown(str(path))}, row {number}", row, field)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error
