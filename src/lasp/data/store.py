"""Built token data: found or made in the cache for a folder of text, or opened where `lasp data build` put it.

One format for both, see lasp.data.build. In the cache a store's folder is named by its source: the tokenizer, the
order, the split and every file's bytes, so a changed folder gives another store.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lasp import files
from lasp.data.blocks import CheckedFile, read_sums
from lasp.data.build import BOUNDS, FORMAT, SPLITS, Progress, seal_digest, write_store
from lasp.data.corpus import TextFile, find_files
from lasp.data.documents import Document, documents_of, is_records
from lasp.data.errors import DataError
from lasp.data.stream import Bounds, ShardFile, TokenStream, check_ids, check_length
from lasp.data.tokenizer import Tokenizer

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """An open store; what is read of it is checked then (lasp.data.blocks)."""

    key: str
    """SHA-256 of the index, and so of the tokens."""
    folder: Path
    tokenizer: str
    """The tokenizer's name, "bytes" for plain bytes."""
    vocab_size: int
    train: TokenStream
    validation: TokenStream
    train_bounds: Bounds
    """Where the documents of the training stream start, and its end."""
    validation_bounds: Bounds
    num_bytes: dict[str, int]
    """Bytes of text per split, separators not counted."""
    num_documents: dict[str, int]


def is_store(folder: Path | None) -> bool:
    """Whether the folder is built data and not text."""
    # Any of its other files may be lost: that is damage, to be named, and does not make it text.
    return folder is not None and (folder / "index.json").is_file() and any(folder.glob("*.bin"))


def tokenizer_of(folder: Path | None) -> str:
    """The name, for load_tokenizer, of the tokenizer that built data in `folder` was made with; "bytes" for text."""
    if folder is None or not is_store(folder) or not (folder / "tokenizer.json").is_file():
        return "bytes"
    return str(folder / "tokenizer.json")


def prepare(
    *,
    folder: Path | None,
    suffixes: tuple[str, ...],
    tokenizer: Tokenizer,
    validation_fraction: float,
    seed: int,
    cache: Path,
    field: str = "text",
) -> TokenStore:
    """Open the built data in `folder`, or find the store of the text in it below `cache`, or build that.

    Files are checked against their SHA-256. Raises DataError if there is no usable text, or built data is damaged.
    """
    if folder is not None and is_store(folder):
        store = open_store(folder, verify=True)
        if store.tokenizer != tokenizer.name:
            raise DataError(
                f"{folder} was built with the tokenizer {store.tokenizer}, not {tokenizer.name}: "
                f"give --data.tokenizer {'bytes' if store.tokenizer == 'bytes' else folder / 'tokenizer.json'}"
            )
        return store
    found = find_files(folder, suffixes, seed)
    target = cache / _source_key(found, tokenizer, field, validation_fraction)[:32]
    if (target / "index.json").exists():
        try:
            return open_store(target, verify=True)
        except DataError:
            # The text is at hand, so a damaged store is rebuilt rather than reported.
            shutil.rmtree(target, ignore_errors=True)
    write_store(target, _documents(found, field, validation_fraction), tokenizer)
    return open_store(target, verify=True)


def build(
    target: Path,
    *,
    sources: tuple[Path, ...],
    suffixes: tuple[str, ...],
    field: str,
    tokenizer: Tokenizer,
    validation_fraction: float,
    seed: int,
    shard_tokens: int,
    progress: Progress,
) -> TokenStore:
    """Build the text of `sources`, one after another, at `target`, which must not exist. Raises DataError.

    sources: files and folders; none of them is the standard library of the running interpreter.
    """
    if target.exists():
        raise DataError(f"{target} exists: name a new folder, or delete it")
    found = [file for source in sources or (None,) for file in find_files(source, suffixes, seed)]
    documents = _documents(found, field, validation_fraction)
    write_store(target, documents, tokenizer, shard_tokens=shard_tokens, progress=progress)
    return open_store(target, verify=False)


def open_store(folder: Path, *, verify: bool) -> TokenStore:
    """Open the store in `folder`; with `verify` also check the SHA-256 and the ids of its files.

    Raises DataError naming the file if anything differs from the index.
    """
    try:
        index: dict[str, Any] = files.read_json(folder / "index.json", follow=True)
        seal = index["sealed"]
        if seal["format"] != FORMAT:
            raise DataError(f"{folder} has token file format {seal['format']}, this version reads {FORMAT}")
        if seal_digest(seal) != index["sha256"]:
            raise DataError(f"{folder / 'index.json'} does not match its own SHA-256: build the data again")
        streams = {split: _open_split(folder, split, seal, verify) for split in SPLITS}
        return TokenStore(
            key=index["sha256"],
            folder=folder,
            tokenizer=seal["tokenizer"],
            vocab_size=seal["vocab_size"],
            train=streams["train"],
            validation=streams["validation"],
            train_bounds=_open_bounds(folder, "train", seal, verify),
            validation_bounds=_open_bounds(folder, "validation", seal, verify),
            num_bytes={split: seal["splits"][split]["num_bytes"] for split in SPLITS},
            num_documents={split: seal["splits"][split]["num_documents"] for split in SPLITS},
        )
    except OSError as error:
        raise DataError(f"cannot read the built data in {folder}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / 'index.json'} is damaged ({error!r}): build the data again") from error


def _open_split(folder: Path, split: str, seal: dict[str, Any], verify: bool) -> TokenStream:
    entry, dtype = seal["splits"][split], np.dtype(seal["dtype"])
    shards = [ShardFile(folder / shard["file"], shard["num_tokens"], shard["sums"]) for shard in entry["shards"]]
    for file, shard in zip(shards, entry["shards"], strict=True):
        check_length(file.path, file.num_tokens, dtype)
        if verify:
            read_sums(file.path, file.sums)
            _verify(file.path, shard["sha256"], dtype, seal["vocab_size"])
    return TokenStream(shards, dtype, seal["vocab_size"])


def _open_bounds(folder: Path, split: str, seal: dict[str, Any], verify: bool) -> CheckedFile:
    entry = seal["splits"][split]
    path = folder / entry["bounds"]["file"]
    check_length(path, entry["num_documents"] + 1, BOUNDS)
    if verify:
        _verify(path, entry["bounds"]["sha256"], BOUNDS, entry["num_tokens"] + 1)
    return CheckedFile(path, BOUNDS, entry["num_documents"] + 1, entry["bounds"]["sums"])


def _verify(path: Path, expected: str, dtype: np.dtype, limit: int) -> None:
    """Raise DataError naming the file unless it has the SHA-256 `expected` and numbers in [0, limit)."""
    digest, offset = hashlib.sha256(), 0
    with files.open_regular(path, follow=True) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            numbers = np.frombuffer(block, dtype=dtype)
            check_ids(numbers, limit, path, offset)
            offset += len(numbers)
    if digest.hexdigest() != expected:
        raise DataError(f"the token file {path} does not match the SHA-256 in its index: build the data again")


def _documents(found: list[TextFile], field: str, validation_fraction: float) -> Iterator[Document]:
    for file in found:
        yield from documents_of(file, field, validation_fraction)


def _source_key(found: list[TextFile], tokenizer: Tokenizer, field: str, validation_fraction: float) -> str:
    digest = hashlib.sha256(f"{FORMAT}\0{tokenizer.name}\0{tokenizer.separator}\0{validation_fraction}\0".encode())
    for file in found:
        line = f"{field if is_records(file.path) else ''}\0{file.name}\0{files.sha256(file.path, follow=True)}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
