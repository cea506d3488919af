"""The token file: the corpus tokenised once, memory-mapped by every rank.

A store is a folder named by the key of its content:
    train.bin, validation.bin   token ids, little endian, every document followed by the separator
    train.bounds.bin, ..        int64, where every document starts, and the end of the last
    index.json                  written last: sizes and SHA-256 of all files
It is built in a temporary folder and renamed, so a half-built store is never seen. The key covers the tokenizer,
the order, the split and every document's bytes: a changed folder gives another store.
"""

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lasp.data.corpus import Document, find_documents
from lasp.data.errors import DataError
from lasp.data.tokenizer import Tokenizer

FORMAT = 2
SPLITS = ("train", "validation")
BOUNDS = np.dtype("<i8")


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """An open store; tokens are read through memory maps."""

    key: str
    folder: Path
    tokenizer: str
    """The tokenizer's name, "bytes" for plain bytes."""
    vocab_size: int
    train: np.ndarray
    """Training stream [num_tokens], uint16 or uint32, memory-mapped."""
    validation: np.ndarray
    train_bounds: np.ndarray
    """int64 [documents + 1], where the documents of the training stream start, and its end."""
    validation_bounds: np.ndarray
    num_bytes: dict[str, int]
    """Bytes of text per split, separators not counted."""
    num_documents: dict[str, int]


def prepare(
    *,
    folder: Path | None,
    suffixes: tuple[str, ...],
    tokenizer: Tokenizer,
    validation_fraction: float,
    seed: int,
    cache: Path,
) -> TokenStore:
    """Find the corpus' store below `cache`, or build it. Raises DataError if there is no usable text."""
    documents = find_documents(folder, suffixes, validation_fraction, seed)
    key = _key(documents, tokenizer)
    target = cache / key[:32]
    if not (target / "index.json").exists():
        _build(target, key, documents, tokenizer)
    try:
        return open_store(target, verify=True)
    except DataError:
        # The text is at hand, so a damaged store is rebuilt rather than reported.
        shutil.rmtree(target, ignore_errors=True)
        _build(target, key, documents, tokenizer)
        return open_store(target, verify=True)


def open_store(folder: Path, *, verify: bool) -> TokenStore:
    """Open the store in `folder`; with `verify` also check the SHA-256 of its files.

    Raises DataError naming the file if anything differs from the index.
    """
    try:
        index: dict[str, Any] = json.loads((folder / "index.json").read_text())
        if index["format"] != FORMAT:
            raise DataError(f"{folder} has token file format {index['format']}, this version reads {FORMAT}")
        dtype = np.dtype(index["dtype"])
        streams, bounds = {}, {}
        for split in SPLITS:
            entry = index["files"][split]
            streams[split] = _map(folder / f"{split}.bin", dtype, entry["num_tokens"], entry["sha256"], verify)
            bounds[split] = _map(
                folder / f"{split}.bounds.bin", BOUNDS, entry["num_documents"] + 1, entry["bounds_sha256"], verify
            )
        return TokenStore(
            key=index["key"],
            folder=folder,
            tokenizer=index["tokenizer"],
            vocab_size=index["vocab_size"],
            train=streams["train"],
            validation=streams["validation"],
            train_bounds=bounds["train"],
            validation_bounds=bounds["validation"],
            num_bytes={split: index["files"][split]["num_bytes"] for split in SPLITS},
            num_documents={split: index["files"][split]["num_documents"] for split in SPLITS},
        )
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"the token store {folder} is damaged ({error!r}): delete it") from error


def _map(path: Path, dtype: np.dtype[Any], count: int, sha256: str, verify: bool) -> np.ndarray:
    if path.stat().st_size != count * dtype.itemsize:
        raise DataError(
            f"the token file {path} should hold {count:,} numbers of {dtype.itemsize} bytes "
            f"but is {path.stat().st_size:,} bytes long"
        )
    if verify and _sha256(path) != sha256:
        raise DataError(f"the token file {path} does not match the SHA-256 in its index")
    # An empty file cannot be mapped.
    return np.zeros(0, dtype) if count == 0 else np.memmap(path, dtype=dtype, mode="r")


def _key(documents: list[Document], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{FORMAT}\0{tokenizer.name}\0{tokenizer.separator}\0".encode())
    for document in documents:
        line = f"{document.split}\0{document.name}\0{_sha256(document.path)}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _build(target: Path, key: str, documents: list[Document], tokenizer: Tokenizer) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    temporary = target.parent / f".building-{target.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        files: dict[str, dict[str, Any]] = {}
        for split in SPLITS:
            bounds, num_bytes = [0], 0
            digest = hashlib.sha256()
            with open(temporary / f"{split}.bin", "wb") as stream:
                for document in (document for document in documents if document.split == split):
                    text = document.path.read_bytes()
                    ids = tokenizer.encode(text)
                    if not len(ids):  # an empty document contributes no token, not a lone separator
                        continue
                    data = np.append(ids, tokenizer.separator).astype(dtype).tobytes()
                    stream.write(data)
                    digest.update(data)
                    bounds.append(bounds[-1] + len(ids) + 1)
                    num_bytes += len(text)
                stream.flush()
                os.fsync(stream.fileno())
            table = np.array(bounds, BOUNDS).tobytes()
            (temporary / f"{split}.bounds.bin").write_bytes(table)
            files[split] = {
                "num_tokens": bounds[-1],
                "num_bytes": num_bytes,
                "num_documents": len(bounds) - 1,
                "sha256": digest.hexdigest(),
                "bounds_sha256": hashlib.sha256(table).hexdigest(),
            }
        index = {
            "format": FORMAT,
            "key": key,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "separator": tokenizer.separator,
            "dtype": dtype.str,
            "files": files,
        }
        (temporary / "index.json").write_text(json.dumps(index))
        try:
            os.rename(temporary, target)
        except OSError:
            # Another run built the same content first: its store is as good as ours.
            if not (target / "index.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
