"""Documents -> a folder of token shards: streamed, so that memory does not grow with the text, and atomic.

train-00000.bin, ..     token ids, little endian, each document followed by the separator; a shard is full at
                        `shard_tokens`, wherever a document is
train.bounds.bin        where each document starts, and the end of the last: int64, little endian
validation...           likewise
*.bin.sums              digests of the blocks of each of these (lasp.data.blocks)
tokenizer.json          the tokenizer, where it is a file
index.json              written last: sizes and SHA-256 of all these, itself under a SHA-256
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lasp import files
from lasp.data.blocks import BlockSums, sums_path
from lasp.data.documents import SPLITS, Document, Reading
from lasp.data.stream import check_ids
from lasp.data.tokenizer import Tokenizer, files_of
from lasp.errors import DataError

FORMAT = 4
SHARD_TOKENS = 1 << 28
BOUNDS = np.dtype("<i8")

Progress = Callable[[int, int], None]
"""Told the bytes of text read and the tokens written so far."""


def write_store(
    target: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress = lambda _bytes, _tokens: None,
    reading: Reading | None = None,
) -> None:
    """Tokenise `documents` into a new store at `target`; it is there whole or not at all.

    reading: what is counted while they are read; the index keeps it.

    Raises DataError if a document cannot be read, an id is outside the vocabulary, there is no text at all, or the
    files cannot be written.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    splits: dict[str, _SplitWriter] = {}
    reading = Reading() if reading is None else reading
    index: dict[str, Any] = {}
    try:
        with files.whole_folder(target) as temporary:
            splits = {split: _SplitWriter(temporary, split, dtype, shard_tokens) for split in SPLITS}
            is_altered = False
            for document in documents:
                num_altered = tokenizer.num_altered
                found = splits[document.split].add(document, tokenizer)
                was_altered = document.is_rest and is_altered  # a document cut in two counts once
                is_altered = document.altered or tokenizer.num_altered > num_altered
                reading.altered += is_altered and not was_altered
                if not document.is_rest:
                    reading.read += found
                    reading.empty += not found
                progress(
                    sum(split.num_bytes for split in splits.values()),
                    sum(split.num_tokens for split in splits.values()),
                )
            entries = {name: split.close() for name, split in splits.items()}
            if not any(split.num_documents for split in splits.values()):
                raise DataError(f"there is no text to train on: all documents are empty ({reading.summary()})")
            for name, content in files_of(tokenizer).items():
                files.write(temporary / name, content)
            seal = {
                "format": FORMAT,
                "tokenizer": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "separator": tokenizer.separator,
                "dtype": dtype.str,
                "splits": entries,
                "reading": dataclasses.asdict(reading),
            }
            index = {"sealed": seal, "sha256": files.json_sha256(seal)}
            files.write(temporary / "index.json", json.dumps(index))
            files.sync(temporary / "index.json")
    except OSError as error:
        # Another run may have built the same content first: its store is as good as ours.
        if not (index and _holds(target, index)):
            raise DataError(f"cannot build {target}: {error}") from error
    finally:
        for split in splits.values():
            split.abandon()


def _holds(target: Path, index: dict[str, Any]) -> bool:
    try:
        return bool(files.read_json(target / "index.json") == index)
    except (OSError, ValueError):
        return False


class _HashedFile:
    """A file written from front to back."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes, self._digest, self._sums = path, 0, hashlib.sha256(), BlockSums()
        self.stream = open(path, "wb")  # noqa: SIM115 - closed by close()

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self._digest.update(data)
        self._sums.add(data)
        self.num_bytes += len(data)

    def close(self) -> dict[str, str]:
        """Close the file; its name and digests for the index."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        sums = self._sums.close()
        with open(sums_path(self.path), "wb") as stream:
            stream.write(sums)
            stream.flush()
            os.fsync(stream.fileno())
        digests = {"sha256": self._digest.hexdigest(), "sums": hashlib.sha256(sums).hexdigest()}
        return {"file": self.path.name, **digests}


class _SplitWriter:
    """The shards of one split and where its documents start."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._bounds = _HashedFile(folder / f"{split}.bounds.bin")
        self._shard: _HashedFile | None = None
        self._shards: list[dict[str, Any]] = []
        self.num_tokens = self.num_bytes = self.num_documents = 0
        self._write_bound()

    def add(self, document: Document, tokenizer: Tokenizer) -> bool:
        """Write a document; False if it has no text."""
        before = self.num_tokens
        for ids in tokenizer.encode_blocks(self._counted(document.blocks)):
            check_ids(ids, tokenizer.vocab_size, Path(document.name), self.num_tokens - before)
            self._write(ids)
        if self.num_tokens == before:  # an empty document contributes no token, not a lone separator
            return False
        self._write(np.asarray([tokenizer.separator]))
        self._write_bound()
        self.num_documents += 1
        return True

    def _write_bound(self) -> None:
        self._bounds.write(np.asarray([self.num_tokens], dtype=BOUNDS).tobytes())

    def _counted(self, blocks: Iterable[bytes]) -> Iterable[bytes]:
        for block in blocks:
            self.num_bytes += len(block)
            yield block

    def _write(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._shard is None:
                self._shard = _HashedFile(self._folder / f"{self._split}-{len(self._shards):05d}.bin")
            room = self._shard_tokens - self._shard.num_bytes // self._dtype.itemsize
            piece, ids = ids[:room], ids[room:]
            self._shard.write(piece.astype(self._dtype).tobytes())
            self.num_tokens += len(piece)
            if len(piece) == room:
                self._end_shard()

    def _end_shard(self) -> None:
        assert self._shard is not None
        size = self._shard.num_bytes // self._dtype.itemsize
        self._shards.append({"num_tokens": size, **self._shard.close()})
        self._shard = None

    def close(self) -> dict[str, Any]:
        """Finish the files; what the index says of them."""
        if self._shard is not None:
            self._end_shard()
        return {
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "num_documents": self.num_documents,
            "shards": self._shards,
            "bounds": self._bounds.close(),
        }

    def abandon(self) -> None:
        self._bounds.stream.close()
        if self._shard is not None:
            self._shard.stream.close()
