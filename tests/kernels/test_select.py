"""Tests what `auto` takes, and that it says so once."""

from __future__ import annotations

import itertools
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import lasp
from lasp.kernels import select
from lasp.kernels.triton.common import device as devices
from lasp.kernels.triton.decay.plan import CHANNEL, TOKEN
from lasp.kernels.triton.delta.plan import delta_plan


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(select, "_chosen", {})
    caplog.set_level(logging.INFO, select.__name__)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_is_taken_is_said_once(is_compiled: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A compiled graph says it too, where nothing but graphs runs: while it is traced."""

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return lasp.linear_attention(2 * q, k, 2 * k)[0]

    torch._dynamo.reset()
    run = torch.compile(attend, backend="aot_eager") if is_compiled else attend
    for tokens in (3, 3, 5):
        run(torch.randn(1, tokens, 2, 8, requires_grad=True), torch.randn(1, tokens, 2, 8)).sum().backward()
    (said,) = caplog.records
    assert said.levelname == "INFO" and "decay recurrence: torch (the tensors are on cpu" in said.getMessage()


HOPPER, AMPERE, TURING = 9, 8, 7
SHARED_BYTES = {HOPPER: 232448, AMPERE: 166912, TURING: 65536}  # that a program may have


def device(monkeypatch: pytest.MonkeyPatch, major: int) -> torch.device:
    """A GPU of that generation, as far as the choice looks."""
    properties = SimpleNamespace(
        major=major,
        minor=5 if major == TURING else 0,
        multi_processor_count=132,
        shared_memory_per_block_optin=SHARED_BYTES[major],
    )
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(devices, "_devices", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return torch.device("cuda", major)


def test_a_gpu_left_to_pytorch_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpu = device(monkeypatch, HOPPER)
    for family in ("decay", "decay", "delta", "unmasked"):
        select._choose(family, gpu, torch.float64, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]


@pytest.mark.parametrize("major", [AMPERE, HOPPER])
def test_kernels_that_are_not_right_are_not_taken(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests `auto`, and those who ask for them: the delta rule's of few key channels, and of wide keys with a gate per
    channel, of 16 bits, where a program has less shared memory than on Hopper. Others are the controls."""
    gpu = device(monkeypatch, major)
    taken = []
    for way in itertools.product((False, True), (1, 3, 4, 128, 256, 257), (torch.bfloat16, torch.float32)):
        per_channel, keys, dtype = way
        taken += [way] if select._choose("delta", gpu, dtype, keys, per_channel) == "triton" else []
        with nullcontext() if way in taken else pytest.raises(ValueError, match="use backend='torch'"):
            delta_plan(
                1000, 4, keys, 128, dtype, CHANNEL if per_channel else TOKEN, 132, SHARED_BYTES[major], major == HOPPER
            )
    left = [(True, 256, torch.bfloat16)] if major == AMPERE else []
    assert taken == [
        way
        for way in itertools.product((False, True), (4, 128, 256), (torch.bfloat16, torch.float32))
        if way not in left
    ]


def test_a_gpu_too_old_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"compute capability 8\.0 and more, cuda:7 has 7\.5; use backend='torch'"):
        devices.device_limits(device(monkeypatch, TURING))
    assert devices.device_limits(device(monkeypatch, HOPPER)).hopper
