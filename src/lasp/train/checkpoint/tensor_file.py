"""Tensors of a safetensors file, read and not mapped: of a mapped file that is cut short while its tensors are copied,
the first number past its end kills the process.

The file: the length of the header (8 bytes, little endian), the header (JSON: dtype, shape and place of every tensor,
and "__metadata__", words of whoever wrote it), then the numbers. Format: huggingface.co/docs/safetensors.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp import files

SUFFIX = ".safetensors"
_MOST_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """A tensor's place in its file: bytes `start` to `end`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open safetensors file. Raises OSError, and ValueError for a header that is none; both name the file.

    Attributes:
        tensors: what is in it, by name.
        metadata: words of whoever wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = files.open_regular(path)
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._file.close()
            raise ValueError(f"{path} is no safetensors file: {error!r}") from error

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str, offsets: Sequence[int] | None = None, lengths: Sequence[int] | None = None) -> Tensor:
        """A tensor, or the part of `lengths` at `offsets`, on the CPU. Raises OSError if the file was cut short."""
        stored = self.tensors[name]
        if not stored.shape:
            return self._numbers(stored, 0, 1).view(())
        offsets = offsets if offsets is not None else (0,) * len(stored.shape)
        lengths = lengths if lengths is not None else stored.shape
        row = math.prod(stored.shape[1:])
        rows = self._numbers(stored, offsets[0] * row, lengths[0] * row).view(lengths[0], *stored.shape[1:])
        for dim in range(1, len(stored.shape)):
            rows = rows.narrow(dim, offsets[dim], lengths[dim])
        return rows

    def _numbers(self, stored: StoredTensor, first: int, count: int) -> Tensor:
        size = stored.dtype.itemsize
        buffer = torch.empty(count * size, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        place = stored.start + first * size
        while len(view):
            num_read = os.preadv(self._file.fileno(), [view], place)
            if num_read == 0:
                raise OSError(f"{self.path} was cut short while it was read")
            view, place = view[num_read:], place + num_read
        return buffer.view(stored.dtype)

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if length > min(_MOST_HEADER_BYTES, size - 8):
            raise ValueError(f"a header of {length:,} bytes")
        header: dict[str, Any] = files.parse_json(self._file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.tensors = {name: _stored(name, told, 8 + length, size) for name, told in header.items()}


def _stored(name: str, told: dict[str, Any], base: int, size: int) -> StoredTensor:
    dtype, shape = _DTYPES[told["dtype"]], tuple(told["shape"])
    start, end = (base + offset for offset in told["data_offsets"])
    whole = all(type(number) is int and number >= 0 for number in (*shape, start - base))
    if not whole or end > size or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} at bytes {start} to {end} of {size}")
    return StoredTensor(dtype, shape, start, end)
