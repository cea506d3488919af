"""Wrong usage gives the message a user needs."""

from __future__ import annotations

import pytest
import torch

import lasp

OK = {"q": (2, 8, 2, 4), "k": (2, 8, 2, 4), "v": (2, 8, 4, 3)}


def _call(**changed):
    tensors = {name: torch.zeros(shape) for name, shape in OK.items()}
    tensors.update(changed)
    return lasp.linear_attention(
        tensors.pop("q"), tensors.pop("k"), tensors.pop("v"), tensors.pop("g", None), **tensors
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(8, 2, 4)}, r"q must be \[B, T, H, D\]"),
        ({"k": torch.zeros(2, 8, 2, 5)}, r"k must have q's shape \(2, 8, 2, 4\), got \(2, 8, 2, 5\)"),
        ({"v": torch.zeros(2, 9, 4, 3)}, r"v must have q's batch and tokens"),
        ({"v": torch.zeros(2, 8, 3, 3)}, r"multiple of q's"),
        ({"v": torch.zeros(2, 8, 4, 3, dtype=torch.bfloat16)}, r"one dtype, got q torch.float32 and v torch.bfloat16"),
        ({"q": torch.zeros(2, 8, 2, 4, dtype=torch.int64)}, r"q must be one of"),
        ({"g": torch.full((4,), 0.9)}, r"must be <= 0 .*largest value of 0.9"),
        ({"g": torch.full((4,), torch.nan)}, r"must be <= 0"),
        ({"g": torch.zeros(2, 8)}, r"g must be \[H_v\] \(4,\), .* got \(2, 8\)"),
        ({"g": torch.zeros(4), "causal": False}, r"g must be None"),
        ({"initial_state": torch.zeros(2, 4, 3, 4)}, r"initial_state must be \[B, H_v, K, V\] \(2, 4, 4, 3\)"),
        ({"initial_state": torch.zeros(2, 4, 4, 3, dtype=torch.bfloat16)}, r"initial_state must be .*float32"),
        ({"backend": "cuda"}, r"backend must be one of"),
        ({"sp": "ring"}, r"sp must be a SequenceParallel"),
    ],
)
def test_message(changed, message):
    with pytest.raises(ValueError, match=message):
        _call(**changed)


def test_valid_call_passes():
    """The control: the same call, unchanged, is accepted."""
    assert _call()[0].shape == (2, 8, 4, 3)


def test_no_process_group():
    with pytest.raises(ValueError, match="torchrun"):
        lasp.SequenceParallel(None)
