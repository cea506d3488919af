"""The token file: the corpus tokenised once, memory-mapped by every rank.

A store is a folder named by the key of its content:
    train.bin, validation.bin   token ids, little endian, every document followed by the separator
    index.json                  written last: sizes, SHA-256 of both files, and the list of documents
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

FORMAT = 1
SPLITS = ("train", "validation")


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
        streams = {}
        for split in SPLITS:
            entry, path = index["files"][split], folder / f"{split}.bin"
            if path.stat().st_size != entry["num_tokens"] * dtype.itemsize:
                raise DataError(
                    f"the token file {path} should hold {entry['num_tokens']:,} tokens "
                    f"of {dtype.itemsize} bytes but is {path.stat().st_size:,} bytes long"
                )
            if verify and _sha256(path) != entry["sha256"]:
                raise DataError(f"the token file {path} does not match the SHA-256 in its index")
            empty = entry["num_tokens"] == 0  # an empty file cannot be mapped
            streams[split] = np.zeros(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")
        return TokenStore(
            key=index["key"],
            folder=folder,
            tokenizer=index["tokenizer"],
            vocab_size=index["vocab_size"],
            train=streams["train"],
            validation=streams["validation"],
            num_bytes={split: index["files"][split]["num_bytes"] for split in SPLITS},
            num_documents={split: index["files"][split]["num_documents"] for split in SPLITS},
        )
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"the token store {folder} is damaged ({error!r}): delete it") from error


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
        listing = []
        for split in SPLITS:
            num_tokens = num_bytes = num_documents = 0
            digest = hashlib.sha256()
            with open(temporary / f"{split}.bin", "wb") as stream:
                for document in (document for document in documents if document.split == split):
                    text = document.path.read_bytes()
                    ids = tokenizer.encode(text)
                    if not len(ids):  # an empty document contributes no token, not a lone separator
                        continue
                    data = np.append(ids, tokenizer.separator).astype(dtype).tobytes()
                    listing.append([split, document.name, num_tokens, len(ids) + 1])
                    stream.write(data)
                    digest.update(data)
                    num_tokens += len(ids) + 1
                    num_bytes += len(text)
                    num_documents += 1
                stream.flush()
                os.fsync(stream.fileno())
            files[split] = {
                "num_tokens": num_tokens,
                "num_bytes": num_bytes,
                "num_documents": num_documents,
                "sha256": digest.hexdigest(),
            }
        index = {
            "format": FORMAT,
            "key": key,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "separator": tokenizer.separator,
            "dtype": dtype.str,
            "files": files,
            "documents": {"columns": ["split", "name", "first_token", "num_tokens"], "rows": listing},
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
