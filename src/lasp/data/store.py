"""Built token data: found or made in the cache for a folder of text, or opened where `lasp data build` put it.

One format for both, see lasp.data.build. In the cache a store's folder is named by its source: the tokenizer, the
order, the split and every file's bytes, so a changed folder gives another store.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lasp import files
from lasp.data.arguments import VERIFY, check, check_path, check_text, check_tokenizer, check_whole
from lasp.data.blocks import CheckedFile, read_sums
from lasp.data.build import BOUNDS, FORMAT, SPLITS, Progress, write_store
from lasp.data.documents import Reading
from lasp.data.sources import Sources
from lasp.data.stream import Bounds, ShardFile, TokenStream, check_ids, check_length
from lasp.data.tokenizer import ByteTokenizer, Tokenizer, read_tokenizer
from lasp.data.verified import Verified
from lasp.errors import DataError

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
    reading: Reading
    """What became of the documents when they were read."""


def is_store(folder: Path | None) -> bool:
    """True if the folder is built data and not text."""
    # Any of its other files may be lost: that is damage, to be named, and does not make it text.
    return folder is not None and (folder / "index.json").is_file() and any(folder.glob("*.bin"))


def tokenizer_of(folder: Path | None) -> Tokenizer:
    """The tokenizer that built data in `folder` was made with; bytes for text. Raises DataError if it is damaged."""
    if folder is None or not is_store(folder):
        return ByteTokenizer()
    with _naming_damage(folder):
        return read_tokenizer(folder, _seal(folder)["tokenizer"])


def prepare(
    *,
    folder: Path | None,
    suffixes: tuple[str, ...],
    tokenizer: Tokenizer,
    validation_fraction: float,
    seed: int,
    cache: Path,
    field: str = "text",
    validation_path: Path | None = None,
    on_bad_record: str = "stop",
    verify: str = "changed",
) -> TokenStore:
    """Open the built data in `folder`, or find the store of the text in it below `cache`, or build that.

    validation_path: text to validate on, instead of a share of `folder`'s. on_bad_record: "stop" or "skip". verify:
    "full" checks the SHA-256 of all files, "changed" of those whose size or time of change differs from when they were
    checked last. Raises DataError if there is no usable text, or built data is damaged.
    """
    check_path("folder", folder, or_none=True)
    check_path("cache", cache)
    check_tokenizer(tokenizer)
    check_text(suffixes, field, validation_fraction, seed, validation_path, on_bad_record)
    check("verify", verify, isinstance(verify, str) and verify in VERIFY, " or ".join(VERIFY))
    place = hashlib.sha256(str((folder or Path("/")).absolute()).encode("utf-8", "surrogateescape")).hexdigest()
    verified = Verified(cache / f"verified-{place[:16]}.json", full=verify == "full")
    if folder is not None and is_store(folder):
        store = _opened_as(folder, tokenizer, validation_path, verified)
    else:
        text = Sources.find((folder,), suffixes, field, validation_fraction, seed, validation_path, on_bad_record)
        store = _found_or_built(text, cache, tokenizer, verified)
    verified.save()
    return store


def _found_or_built(text: Sources, cache: Path, tokenizer: Tokenizer, verified: Verified) -> TokenStore:
    target = cache / text.key(tokenizer, verified)[:32]
    if (target / "index.json").exists():
        try:
            return open_store(target, verify=True, verified=verified)
        except DataError:
            # The text is at hand, so a damaged store is rebuilt rather than reported.
            shutil.rmtree(target, ignore_errors=True)
    write_store(target, text.documents(), tokenizer, reading=text.reading)
    return open_store(target, verify=True, verified=verified)


def _opened_as(folder: Path, tokenizer: Tokenizer, validation_path: Path | None, verified: Verified) -> TokenStore:
    store = open_store(folder, verify=True, verified=verified)
    if store.tokenizer != tokenizer.name:
        raise DataError(
            f"{folder} was built with the tokenizer {store.tokenizer}, not {tokenizer.name}: leave out "
            "--data.tokenizer, or build the data again"
        )
    if validation_path is not None:
        raise DataError(
            f"{folder} is built, with its own text held out: give --validation-path to `lasp data build` instead"
        )
    return store


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
    validation_path: Path | None = None,
    on_bad_record: str = "stop",
) -> TokenStore:
    """Build the text of `sources`, one after another, at `target`, which must not exist. Raises DataError.

    sources: files and folders; none of them is the standard library of the running interpreter.
    """
    check_path("target", target)
    is_paths = isinstance(sources, tuple) and all(isinstance(source, Path) for source in sources)
    check("sources", sources, is_paths, "a tuple of paths")
    check_tokenizer(tokenizer)
    check_text(suffixes, field, validation_fraction, seed, validation_path, on_bad_record)
    check_whole("shard_tokens", shard_tokens, 1)
    check("progress", progress, callable(progress), "a function of bytes and tokens")
    if target.exists():
        raise DataError(f"{target} exists: name a new folder, or delete it")
    text = Sources.find(sources or (None,), suffixes, field, validation_fraction, seed, validation_path, on_bad_record)
    write_store(target, text.documents(), tokenizer, shard_tokens=shard_tokens, progress=progress, reading=text.reading)
    return open_store(target, verify=False)


def open_store(folder: Path, *, verify: bool, verified: Verified | None = None) -> TokenStore:
    """Open the store in `folder`; with `verify` also check the SHA-256 and the ids of its files, but for those that
    `verified` knows.

    Raises DataError naming the file if anything differs from the index.
    """
    check_path("folder", folder)
    check("verify", verify, isinstance(verify, bool), "True or False")
    check("verified", verified, isinstance(verified, Verified | None), "a Verified or None")
    with _naming_damage(folder):
        seal = _seal(folder)
        streams = {split: _open_split(folder, split, seal, verify, verified) for split in SPLITS}
        return TokenStore(
            key=files.json_sha256(seal),
            folder=folder,
            tokenizer=seal["tokenizer"],
            vocab_size=seal["vocab_size"],
            train=streams["train"],
            validation=streams["validation"],
            train_bounds=_open_bounds(folder, "train", seal, verify, verified),
            validation_bounds=_open_bounds(folder, "validation", seal, verify, verified),
            num_bytes={split: seal["splits"][split]["num_bytes"] for split in SPLITS},
            num_documents={split: seal["splits"][split]["num_documents"] for split in SPLITS},
            reading=Reading(**seal["reading"]),
        )


def _seal(folder: Path) -> dict[str, Any]:
    """Read the index and verify its digest. Raises DataError."""
    index: dict[str, Any] = files.read_json(folder / "index.json", follow=True)
    seal: dict[str, Any] = index["sealed"]
    if seal["format"] != FORMAT:
        raise DataError(f"{folder} has token file format {seal['format']}, this version reads {FORMAT}: build it again")
    if files.json_sha256(seal) != index["sha256"]:
        raise DataError(f"{folder / 'index.json'} does not match its own SHA-256: build the data again")
    return seal


@contextmanager
def _naming_damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read the built data in {folder}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / 'index.json'} is damaged ({error!r}): build the data again") from error


def _open_split(folder: Path, split: str, seal: dict[str, Any], verify: bool, verified: Verified | None) -> TokenStream:
    entry, dtype = seal["splits"][split], np.dtype(seal["dtype"])
    shards = [ShardFile(folder / shard["file"], shard["num_tokens"], shard["sums"]) for shard in entry["shards"]]
    for file, shard in zip(shards, entry["shards"], strict=True):
        check_length(file.path, file.num_tokens, dtype)
        if verify:
            read_sums(file.path, file.sums)
            _verify(file.path, shard["sha256"], dtype, seal["vocab_size"], verified)
    return TokenStream(shards, dtype, seal["vocab_size"])


def _open_bounds(
    folder: Path, split: str, seal: dict[str, Any], verify: bool, verified: Verified | None
) -> CheckedFile:
    entry = seal["splits"][split]
    path = folder / entry["bounds"]["file"]
    check_length(path, entry["num_documents"] + 1, BOUNDS)
    if verify:
        _verify(path, entry["bounds"]["sha256"], BOUNDS, entry["num_tokens"] + 1, verified)
    return CheckedFile(path, BOUNDS, entry["num_documents"] + 1, entry["bounds"]["sums"])


def _verify(path: Path, expected: str, dtype: np.dtype, limit: int, verified: Verified | None) -> None:
    """Raise DataError naming the file unless it has the SHA-256 `expected` and numbers in [0, limit)."""
    if verified is not None and verified.known(path) == expected:
        return
    digest, offset = hashlib.sha256(), 0
    with files.open_regular(path, follow=True) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            numbers = np.frombuffer(block, dtype=dtype)
            check_ids(numbers, limit, path, offset)
            offset += len(numbers)
    if digest.hexdigest() != expected:
        raise DataError(f"the token file {path} does not match the SHA-256 in its index: build the data again")
    if verified is not None:
        verified.remember(path, expected)
