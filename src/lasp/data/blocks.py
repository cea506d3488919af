"""Numbers in a file, each block of which is checked against its digest before a number of it is used.

Beside FILE lies FILE.sums: for every block of 16 KiB the first 16 bytes of its SHA-256, under a SHA-256 in the index.
A training run reads its data for weeks: what a disk, a memory or another program changes meanwhile is not trained on.
The file is read, not mapped: of a mapped file that was cut short, the first number past its end kills the process.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lasp import files
from lasp.errors import DataError

BLOCK_BYTES, _SUM_BYTES = 1 << 14, 16
# Blocks kept, found good, of one file: neighbours of a window, or the middles of a search.
_KEPT_BLOCKS = 16
_MOST_SUMS_BYTES = 1 << 32


class BlockSums:
    """Adds up the blocks of a file that is written from front to back."""

    def __init__(self) -> None:
        self._sums = bytearray()
        self._block, self._filled = hashlib.sha256(), 0

    def add(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            piece = view[: BLOCK_BYTES - self._filled]
            self._block.update(piece)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == BLOCK_BYTES:
                self._end_block()

    def close(self) -> bytes:
        if self._filled:
            self._end_block()
        return bytes(self._sums)

    def _end_block(self) -> None:
        self._sums += self._block.digest()[:_SUM_BYTES]
        self._block, self._filled = hashlib.sha256(), 0


def sums_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sums")


def read_sums(path: Path, sha256: str) -> bytes:
    """The digests of the blocks of `path`, which have the SHA-256 of the index. Raises DataError."""
    place = sums_path(path)
    try:
        sums = files.read(place, _MOST_SUMS_BYTES, follow=True)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {place}: {error}: build the data again") from error
    if hashlib.sha256(sums).hexdigest() != sha256:
        raise DataError(f"{place} does not match the SHA-256 in its index: build the data again")
    return sums


class CheckedFile:
    """A read-only sequence of numbers in a file; slices of it are arrays, single ones integers.

    Args:
        path: of the file; opened here, and its digests read.
        num_items: how many numbers it holds, of `dtype`, whose size divides that of a block.
        sums_sha256: of the digests, from the index.

    Raises:
        DataError: naming the file, here and wherever a block that is read is not what was built.
    """

    def __init__(self, path: Path, dtype: np.dtype, num_items: int, sums_sha256: str) -> None:
        self.path, self.dtype, self.shape = path, dtype, (num_items,)
        self._sums = read_sums(path, sums_sha256)
        try:
            self._file = files.open_regular(path, follow=True)
        except OSError as error:
            raise DataError(f"cannot read the token file {path}: {error}") from error
        self._block = lru_cache(maxsize=_KEPT_BLOCKS)(self._read)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, slice):
            place = range(len(self))[place]
            return int(self[place : place + 1][0])
        start, stop, step = place.indices(len(self))
        assert step == 1
        per_block = BLOCK_BYTES // self.dtype.itemsize
        blocks = range(start // per_block, -(-stop // per_block)) if stop > start else range(0)
        pieces = [self._block(block)[max(0, start - block * per_block) : stop - block * per_block] for block in blocks]
        return np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def tolist(self) -> list[int]:
        return list(self[:].tolist())

    def _read(self, block: int) -> np.ndarray:
        try:
            data = os.pread(self._file.fileno(), BLOCK_BYTES, block * BLOCK_BYTES)
        except OSError as error:
            raise DataError(f"cannot read the token file {self.path}: {error}") from error
        expected = self._sums[block * _SUM_BYTES : (block + 1) * _SUM_BYTES]
        if hashlib.sha256(data).digest()[:_SUM_BYTES] != expected:
            raise DataError(
                f"the token file {self.path} has changed since it was built, in bytes {block * BLOCK_BYTES:,} to "
                f"{(block + 1) * BLOCK_BYTES:,}: build the data again"
            )
        return np.frombuffer(data, self.dtype)
