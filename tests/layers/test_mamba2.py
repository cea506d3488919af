"""Mamba-2's layer against the SSD paper's definition: a masked matrix of scores, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tolerances import relative_error
from world import run

import lasp
from lasp.layers import DeltaNet, LayerContext, Mamba2

T = 23


def layer_and_input(num_groups: int = 2):
    torch.manual_seed(0)
    config = Mamba2.Config(num_heads=4, value_dim=5, key_dim=6, num_key_heads=num_groups, conv_width=4)
    layer = config.build(LayerContext(12)).double()
    with torch.no_grad():
        for parameter in (layer.skip, layer.gain, layer.convolution.bias):
            parameter.normal_()  # type: ignore[operator]
    return layer, torch.randn(2, T, 12, dtype=torch.float64)


def quadratic(layer: Mamba2, x, *, mistake: str = ""):
    """y = (L o C B^T) (dt x) + D x, L[i, j] = exp(sum of A dt over j+1 .. i) (arXiv 2405.21060, eq. 7 and 16)."""
    inner, shared = layer.num_heads * layer.head_dim, layer.num_groups * layer.state_dim
    projected = x @ layer.in_proj.weight.T
    z, xbc, dt = projected[..., :inner], projected[..., inner : 2 * inner + 2 * shared], projected[..., -4:]
    weight, bias = layer.convolution.weight, layer.convolution.bias
    padded = F.pad(xbc, (0, 0, 3, 0))
    xbc = F.silu(sum(padded[:, j : j + T] * weight[:, j] for j in range(4)) + bias)
    values = xbc[..., :inner].reshape(2, T, 4, 5)
    b, c = (xbc[..., part : part + shared].reshape(2, T, -1, 6) for part in (inner, inner + shared))
    b, c = (t.repeat_interleave(4 // layer.num_groups, 2) for t in (b, c))
    dt = torch.log1p((dt + layer.decay.bias).exp())
    a = -layer.decay.log_rate.exp() * dt
    mask = torch.zeros(2, T, T, 4, dtype=x.dtype)
    for i in range(T):
        for j in range(i + 1):
            mask[:, i, j] = a[:, j + (mistake != "own decay") : i + 1].sum(1).exp()
    scores = torch.einsum("bihn,bjhn->bijh", c, b) * mask
    weighted = values if mistake == "no step" else dt[..., None] * values
    y = torch.einsum("bijh,bjhp->bihp", scores, weighted) + layer.skip[:, None] * values
    y = y.reshape(2, T, inner) * F.silu(z)
    groups = 1 if mistake == "one norm" else layer.num_groups
    y = y.reshape(2, T, groups, -1)
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(2, T, inner) * layer.gain
    return y @ layer.out_proj.weight.T


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_layer_equals_the_definition(num_groups):
    layer, x = layer_and_input(num_groups)
    with torch.no_grad():
        assert relative_error(layer(x)[0], quadratic(layer, x)) < 1e-13


@pytest.mark.parametrize("mistake", ["own decay", "no step", "one norm"])
def test_mistakes_are_seen(mistake):
    """The control: each departure from the definition fails the comparison."""
    layer, x = layer_and_input()
    with torch.no_grad():
        assert relative_error(layer(x)[0], quadratic(layer, x, mistake=mistake)) > 1e-3


def test_gradients():
    """Through the definition, by PyTorch, and through the layer: every parameter and the input."""
    layer, x = layer_and_input()
    x.requires_grad_()
    tensors = [x, *layer.parameters()]
    got = torch.autograd.grad(layer(x)[0].square().sum(), tensors)
    expected = torch.autograd.grad(quadratic(layer, x).square().sum(), tensors)
    assert max(relative_error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-12


def test_crosses_ranks():
    """Shards shorter than the convolution, and an empty one: outputs and the input's gradient as on one device."""
    layer, x = layer_and_input()
    x.requires_grad_()
    y, _ = layer(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)

    def work(rank: int) -> float:
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=(2, 0, 21))
        shard = sp.shard(x.detach()).clone().requires_grad_()
        here, _ = layer(shard, sp=sp)
        here.square().sum().backward()
        return max(relative_error(here, sp.shard(y.detach())), relative_error(shard.grad, sp.shard(expected)))

    assert max(run(3, work)) < 1e-12


def test_heads_and_groups_must_fit():
    with pytest.raises(ValueError, match="num_key_heads must divide num_heads 4, got 3"):
        Mamba2.Config(num_heads=4, value_dim=2, key_dim=4, num_key_heads=3)


@pytest.mark.parametrize(("config", "name"), [(Mamba2.Config, "in_proj"), (DeltaNet.Config, "q_proj")])
def test_what_stands_around_a_projection_is_called(config: Any, name: str) -> None:
    """Products are joined of plain linear layers only: hooks are called, a forward of its own, and an adapter, which
    has its layer's weight too."""

    class Adapter(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1.0

    torch.manual_seed(0)
    layer = config(num_heads=2, key_dim=6, value_dim=5).build(LayerContext(12))
    x = torch.randn(1, T, 12)
    plain = layer(x)[0]
    before = getattr(layer, name)
    hook = before.register_forward_hook(lambda module, args, output: output + 1.0)
    assert relative_error(layer(x)[0], plain) > 0.01
    hook.remove()
    seen: list[torch.nn.Module] = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    assert torch.equal(layer(x)[0], plain) and before in seen
    hook.remove()
    before.forward = lambda x: torch.nn.Linear.forward(before, x) + 1.0
    assert relative_error(layer(x)[0], plain) > 0.01
    adapter = Adapter(before.in_features, before.out_features, bias=False)
    adapter.weight = before.weight
    setattr(layer, name, adapter)
    assert relative_error(layer(x)[0], plain) > 0.01


def test_double_precision_stays():
    """Autocast leaves doubles alone, and steps next to nothing have fp64's digits."""
    torch.manual_seed(0)
    layer = Mamba2.Config(num_heads=2, key_dim=6, value_dim=5).build(LayerContext(12)).double()
    x = torch.randn(1, T, 12, dtype=torch.float64)
    plain = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(layer(x)[0], plain) < 1e-14
    raw = torch.linspace(-60, 5, 131, dtype=torch.float64)[None, :, None].expand(1, -1, 2)
    step = layer.decay.logarithms(raw)[0].exp()
    assert ((step - F.softplus(raw + layer.decay.bias)) / step).abs().max() < 1e-14
