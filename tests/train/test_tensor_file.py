"""Tensors of safetensors files without a map of them: the same numbers, and a cut file is an error, not a signal."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lasp.train.tensor_file import TensorFile


def write(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    tensors = {str(dtype): torch.randn(5, 4, 3, generator=generator).mul(50).abs().to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "flags": torch.tensor([True, False])}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_the_numbers_are_those_of_safetensors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    expected = load_file(path)
    with TensorFile(path) as file:
        assert file.tensors.keys() == expected.keys() and file.metadata == {"format": "pt"}
        for name, tensor in expected.items():
            assert file.read(name).dtype == tensor.dtype and torch.equal(file.read(name), tensor)
        part = file.read("torch.bfloat16", (1, 0, 2), (3, 4, 1))
        assert torch.equal(part, expected["torch.bfloat16"][1:4, :, 2:3])
        assert not torch.equal(part, expected["torch.bfloat16"][0:3, :, 2:3])  # the control


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    numbers = torch.arange(1 << 16)
    save_file({"numbers": numbers}, path)
    with TensorFile(path) as file:
        os.truncate(path, 8192)
        with pytest.raises(OSError, match=r"a\.safetensors was cut short while it was read"):
            file.read("numbers")
    # The control: of the mapped file, the kernel ends the process.
    save_file({"numbers": numbers}, path)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        with safe_open(path, framework="pt") as mapped:
            os.truncate(path, 8192)
            mapped.get_tensor("numbers").sum()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS


def test_no_damaged_header_is_more_than_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    good, source, refused = path.read_bytes(), random.Random(0), 0
    length = 8 + int.from_bytes(good[:8], "little")
    for _ in range(500):
        damaged = bytearray(good)
        damaged[source.randrange(length)] ^= 1 << source.randrange(8)
        path.write_bytes(damaged)
        try:
            with TensorFile(path) as file:
                for name in file.tensors:
                    file.read(name)
        except ValueError as error:
            refused += "a.safetensors is no safetensors file" in str(error)
    assert refused > 300  # others changed a name, or the metadata: a digest sees those
    for content in (b"", good[:7], good[: length - 1], good[: length + 3], b"\xff" * 8 + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no safetensors file"):
            TensorFile(path)
