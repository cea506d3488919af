"""The tokens of one split: shard files end to end, opened when first read, checked as they are read."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lasp.data.blocks import CheckedFile
from lasp.errors import DataError

# Files kept open: each holds a file descriptor, of which a process may have few.
_OPEN_FILES = 64


class ShardFile(NamedTuple):
    path: Path
    num_tokens: int
    sums: str
    """SHA-256 of the digests of its blocks, see lasp.data.blocks."""


class TokenStream:
    """A read-only sequence of token ids; slices of it are int64 arrays, read from disk.

    Args:
        files: the shards in order.
        dtype: of the ids on disk, such as "<u2".
        vocab_size: ids at or above it are refused.
    """

    def __init__(self, files: Sequence[ShardFile], dtype: np.dtype, vocab_size: int) -> None:
        self.files, self.dtype, self.vocab_size = tuple(files), dtype, vocab_size
        self._starts = (0, *accumulate(file.num_tokens for file in files))
        self._file = lru_cache(maxsize=_OPEN_FILES)(self._open)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, window: slice) -> np.ndarray:
        """Tokens start .. stop - 1, int64. Raises DataError for a changed file or an id outside the vocabulary."""
        start, stop, _ = window.indices(len(self))
        tokens = np.empty(max(0, stop - start), dtype=np.int64)
        filled, index = 0, bisect_right(self._starts, start) - 1
        while filled < len(tokens):
            first = start + filled - self._starts[index]
            piece = self._file(index)[first : first + len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            if len(piece):
                check_ids(tokens[filled : filled + len(piece)], self.vocab_size, self.files[index].path, first)
            filled, index = filled + len(piece), index + 1
        return tokens

    def _open(self, index: int) -> CheckedFile:
        path, num_tokens, sums = self.files[index]
        check_length(path, num_tokens, self.dtype)
        return CheckedFile(path, self.dtype, num_tokens, sums)


Tokens = np.ndarray | TokenStream
"""Token ids that slices are taken of."""
Bounds = np.ndarray | CheckedFile
"""int64 [documents + 1], where the documents of a stream start, and its end."""


def check_length(path: Path, num_items: int, dtype: np.dtype) -> None:
    """Raise DataError naming the file unless it is there and exactly `num_items` long."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read the token file {path}: {error}") from error
    if size != num_items * dtype.itemsize:
        raise DataError(
            f"the token file {path} should be {num_items:,} numbers of {dtype.itemsize} bytes long "
            f"but is {size:,} bytes long: build the data again"
        )


def check_ids(ids: np.ndarray, vocab_size: int, path: Path, first: int) -> None:
    """Raise DataError naming shard, offset, id and vocabulary unless all `ids` are in [0, vocab_size).

    first: the offset of ids[0] in the shard, in tokens.
    """
    if len(ids) and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        place = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
        raise DataError(
            f"the token file {path} has at offset {first + place:,} the token id {int(ids[place])}, "
            f"outside the vocabulary of {vocab_size:,}"
        )
