"""What `auto` takes, and that it says so once."""

from __future__ import annotations

import logging

import pytest
import torch

import lasp
from lasp.kernels import select


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(select, "_chosen", {})
    caplog.set_level(logging.INFO, select.__name__)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_is_taken_is_said_once(is_compiled: bool, caplog: pytest.LogCaptureFixture) -> None:
    """In a compiled graph too, where nothing but graphs runs: while it is traced."""

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return lasp.linear_attention(2 * q, k, 2 * k)[0]

    torch._dynamo.reset()
    run = torch.compile(attend, backend="aot_eager") if is_compiled else attend
    for tokens in (3, 3, 5):
        run(torch.randn(1, tokens, 2, 8, requires_grad=True), torch.randn(1, tokens, 2, 8)).sum().backward()
    (said,) = caplog.records
    assert said.levelname == "INFO" and "decay recurrence: torch (the tensors are on cpu" in said.getMessage()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A Hopper GPU, as far as the choice looks."""

    class Hopper:
        major = 9

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Hopper())
    return torch.device("cuda")


def test_a_gpu_left_to_pytorch_is_a_warning(gpu: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    for family in ("decay", "decay", "delta", "unmasked"):
        select._choose(family, gpu, torch.float64, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]


def test_kernels_not_known_to_be_right_are_not_taken(gpu: torch.device) -> None:
    """The delta rule's of wide heads with a gate per channel; other gates and narrower heads are the controls."""
    taken = {
        (channels, width): select._choose("delta", gpu, torch.bfloat16, width, width if channels else 0)
        for channels in (False, True)
        for width in (128, 256)
    }
    assert [way for way, backend in taken.items() if backend == "torch"] == [(True, 256)]
