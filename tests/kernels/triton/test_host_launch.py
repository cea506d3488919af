"""Tests which launches go past Triton: those where nothing has changed that decides the binary, or who is told."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from lasp.kernels.triton.common import launch as launches
from lasp.kernels.triton.common.launch import Launch, bind

STREAM, FUNCTION, METADATA = 7, 11, (4, 1, 0)


class Kernel:
    """Stands for a jitted one on a GPU: notes the arguments of launches by Triton, and of those past it."""

    def __init__(self) -> None:
        self.arg_names: list[str] = []
        self.by_triton: list[tuple[Any, ...]] = []
        self.directly: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def call(*, num_warps: int, num_stages: int, **arguments: Any) -> Any:
            self.by_triton.append((grid, arguments))
            binary = len(self.by_triton)
            return SimpleNamespace(
                run=lambda *given: self.directly.append((binary, *given)), function=FUNCTION, packed_metadata=METADATA
            )

        return call


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(Tensor, "get_device", lambda tensor: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    active = SimpleNamespace(get_current_stream=lambda device: STREAM)
    monkeypatch.setattr(launches, "driver", SimpleNamespace(active=active))
    return Kernel()


def launch_of(kernel: Kernel, *names: str, grid: tuple[int, int] = (1, 1), **fixed: Any) -> Launch:
    kernel.arg_names = [*names, *fixed]
    return bind(kernel, grid, dict(reversed(fixed.items())), warps=4, stages=1)


def test_after_the_first_call_a_binary_gets_addresses(kernel: Kernel) -> None:
    """Addresses are in the order of the kernel's parameters, whatever the order they were named in."""
    launch = launch_of(kernel, "x_ptr", "y_ptr", grid=(3, 2), n=5, scale=0.5, C=64, PACKED=True)
    x, y = torch.zeros(8), torch.zeros(8)
    for _ in range(2):
        launch(y_ptr=y, x_ptr=x)
    assert kernel.by_triton == [((3, 2), {"x_ptr": x, "y_ptr": y, "n": 5, "scale": 0.5, "C": 64, "PACKED": True})]
    others = (FUNCTION, METADATA, None, None, None)
    assert kernel.directly == [(1, 3, 2, 1, STREAM, *others, x.data_ptr(), y.data_ptr(), 5, 0.5, 64, True)]
    with pytest.raises(TypeError, match="y_ptr"):
        launch(x_ptr=x)
    with pytest.raises(AssertionError, match="takes"):
        bind(kernel, (1, 1), {"n": 5, "scales": 0.5, "C": 64, "PACKED": True}, warps=4, stages=1)


def test_with_and_without_its_last_tensor_a_kernel_is_two_binaries(kernel: Kernel) -> None:
    launch, x = launch_of(kernel, "x_ptr", "last_ptr"), torch.zeros(8)
    for last in (x, None, x, None):
        launch(x_ptr=x, last_ptr=last)
    assert [tensors["last_ptr"] for _, tensors in kernel.by_triton] == [x, None]
    assert [(call[0], *call[-2:]) for call in kernel.directly] == [(1, *[x.data_ptr()] * 2), (2, x.data_ptr(), 0)]


def test_what_triton_must_see(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, x = launch_of(kernel, "x_ptr"), torch.zeros(8)
    launch(x_ptr=x[1:])  # not aligned: its binary is not for others
    launch(x_ptr=x)
    launch(x_ptr=x[1:])
    assert (len(kernel.by_triton), len(kernel.directly)) == (3, 0)
    with monkeypatch.context() as m:
        m.setattr(torch._C, "_cuda_getDevice", lambda: 1)
        launch(x_ptr=x)
    with monkeypatch.context() as m:
        m.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
        launch(x_ptr=x)
    assert (len(kernel.by_triton), len(kernel.directly)) == (5, 0)
    launch(x_ptr=x)
    assert [call[0] for call in kernel.directly] == [2]


def test_other_dtypes_are_another_launch(kernel: Kernel) -> None:
    """A binary takes addresses for its own dtypes. Seen at calls that Triton sees: at all in its interpreter."""
    launch, x = launch_of(kernel, "x_ptr"), torch.zeros(8)[1:]
    launch(x_ptr=x)
    with pytest.raises(AssertionError, match=r"x_ptr in torch\.float32 got torch\.bfloat16"):
        launch(x_ptr=x.bfloat16())


def test_nothing_is_launched_over_nothing(kernel: Kernel) -> None:
    launch_of(kernel, "x_ptr", grid=(0, 2))(x_ptr=torch.zeros(0))
    assert not kernel.by_triton
