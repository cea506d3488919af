"""The gradient of gates in fp32 by the PyTorch backend, head by head: per token, and summed over tokens.

A head that forgets within a few tokens has a small gradient, which a whole tensor's error would hide.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import BOUNDS, relative_error
from torch import Tensor

import lasp

RATES = torch.tensor((-1e-3, -0.1, -1.6, -6.0, -16.0))
B, T, D = 4, 200, 16


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_every_head(delta: bool, per_channel: bool) -> None:
    random = torch.Generator().manual_seed(0)
    shape = (B, T, len(RATES), D)
    q, k, v, d_o = (torch.randn(shape, generator=random) for _ in range(4))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = torch.rand(shape[:3], generator=random)
    rates = RATES[:, None] if per_channel else RATES
    g = rates * 2 * torch.rand(shape if per_channel else shape[:3], generator=random)

    def gradient(dtype: torch.dtype) -> Tensor:
        inputs = [tensor.to(dtype, copy=True) for tensor in (q, k, v, *([beta] if delta else []), g)]
        inputs[-1].requires_grad_()
        o, _ = (lasp.delta_rule if delta else lasp.linear_attention)(*inputs, backend="torch")
        return torch.autograd.grad(o, inputs[-1], d_o.to(dtype))[0]

    found, expected = gradient(torch.float32), gradient(torch.float64)
    for of_head, reference in zip(found.unbind(2), expected.unbind(2), strict=True):
        assert relative_error(of_head, reference) <= BOUNDS[torch.float32]
        assert relative_error(of_head.double().sum(1), reference.sum(1)) <= BOUNDS[torch.float32]
    # The control: an error of the whole tensor's rounding is seen in the head that forgets most.
    off = found + torch.finfo(torch.float32).eps * expected.norm() / expected.numel() ** 0.5
    assert relative_error(off.double().sum(1)[:, -1], expected.sum(1)[:, -1]) > BOUNDS[torch.float32]
