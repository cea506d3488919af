"""DeltaNet, Gated DeltaNet, KDA and GLA as published, against their recurrences written out token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tolerances import relative_error
from world import run

import lasp
from lasp.layers import DeltaNet, GatedLinearAttention, LayerContext, SteppedDecay

T, D = 11, 12
KINDS: dict[str, dict[str, Any]] = {
    "deltanet": {},
    "negative": {"negative_eigenvalues": True},
    "gated-deltanet": {"learned_decay": "head", "output_gate": "silu", "num_key_heads": 2},
    "kda": {"learned_decay": "channel", "output_gate": "sigmoid", "gate_rank": 3},
}


def layer_and_input(kind: str):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_heads": 4, "key_dim": 3, "value_dim": 5}
    config = GatedLinearAttention.Config(**sizes) if kind == "gla" else DeltaNet.Config(**sizes, **KINDS[kind])
    layer = config.build(LayerContext(D)).double()
    with torch.no_grad():
        layer.norm.norm.weight.normal_()  # type: ignore[operator, union-attr]
    return layer, torch.randn(2, T, D, dtype=torch.float64)


def linear(module, x):
    """A projection, of full or of low rank."""
    if hasattr(module, "down"):
        x = x @ module.down.weight.T @ module.up.weight.T
        return x if module.up.bias is None else x + module.up.bias
    return x @ module.weight.T


def normed(layer, o, x):
    """RMS norm per head, gain, output gate, projection; o [2, T, 4, 5]."""
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.norm.weight
    o = o.flatten(2)
    if layer.gate_proj is not None:
        gate = linear(layer.gate_proj, x)
        o = o * gate.sigmoid() * (1 if layer.norm.activation is torch.sigmoid else gate)
    return o @ layer.out_proj.weight.T


def delta_by_token(layer, x, *, max_beta=1.0, mistake=""):
    mixed = torch.cat([linear(p, x) for p in (layer.q_proj, layer.k_proj, layer.v_proj)], -1)
    if mistake != "no convolution":
        padded = F.pad(mixed, (0, 0, 3, 0))
        mixed = sum(padded[:, j : j + T] * layer.convolution.weight[:, j] for j in range(4))
    mixed = F.silu(mixed)
    heads = layer.key_heads
    q, k, v = mixed.split([heads * 3, heads * 3, 20], -1)
    q, k = (t.unflatten(-1, (heads, 3)) for t in (q, k))
    if mistake != "long keys":
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    q, k = (t.repeat_interleave(4 // heads, 2) for t in (q, k))
    v = v.unflatten(-1, (4, 5))
    beta = max_beta * linear(layer.beta_proj, x).sigmoid()
    decay = torch.ones(2, T, 4, 3, dtype=x.dtype)
    if layer.decay is not None:
        step = F.softplus(linear(layer.decay_proj, x) + layer.decay.bias).unflatten(-1, (4, -1))
        decay = (-layer.decay.log_rate.exp()[:, None] * step).exp().expand(2, T, 4, 3)
    state, outputs = torch.zeros(2, 4, 3, 5, dtype=x.dtype), []
    for t in range(T):
        state = state * decay[:, t, ..., None]
        missing = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], missing)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * 3**-0.5)
    return normed(layer, torch.stack(outputs, 1), x)


def gla_by_token(layer, x, *, mistake=""):
    q, k = (linear(p, x).unflatten(-1, (4, 3)) for p in (layer.q_proj, layer.k_proj))
    v = linear(layer.v_proj, x).unflatten(-1, (4, 5))
    root = 1 if mistake == "no temperature" else 16
    decay = linear(layer.decay_proj, x).sigmoid().pow(1 / root).unflatten(-1, (4, 3))
    state, outputs = torch.zeros(2, 4, 3, 5, dtype=x.dtype), []
    for t in range(T):
        state = state * decay[:, t, ..., None] + k[:, t, ..., None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * 3**-0.5)
    return normed(layer, torch.stack(outputs, 1), x)


@pytest.mark.parametrize("kind", KINDS)
def test_delta_layers(kind):
    layer, x = layer_and_input(kind)
    with torch.no_grad():
        expected = delta_by_token(layer, x, max_beta=2.0 if kind == "negative" else 1.0)
        assert relative_error(layer(x)[0], expected) < 1e-12
        for mistake in ("no convolution", "long keys"):
            assert relative_error(layer(x)[0], delta_by_token(layer, x, mistake=mistake)) > 1e-3


def test_gla():
    layer, x = layer_and_input("gla")
    with torch.no_grad():
        assert relative_error(layer(x)[0], gla_by_token(layer, x)) < 1e-12
        assert relative_error(layer(x)[0], gla_by_token(layer, x, mistake="no temperature")) > 1e-3


@pytest.mark.parametrize("kind", [*KINDS, "gla"])
def test_state_continues(kind):
    """Cut anywhere, also shorter than the convolution, the state handed on gives the whole; without it, not."""
    layer, x = layer_and_input(kind)
    with torch.no_grad():
        whole, _ = layer(x)
        for cut in (2, 7):
            first, state = layer(x[:, :cut], output_state=True)
            second, _ = layer(x[:, cut:], state=state)
            assert relative_error(torch.cat([first, second], 1), whole) < 1e-13
        assert relative_error(layer(x[:, 7:])[0], whole[:, 7:]) > 1e-3


@pytest.mark.parametrize("kind", ["gated-deltanet", "kda", "gla"])
def test_crosses_ranks(kind):
    layer, x = layer_and_input(kind)
    x.requires_grad_()
    y, _ = layer(x)
    expected = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

    def work(rank: int) -> float:
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=(2, 9))
        shard = sp.shard(x.detach()).clone().requires_grad_()
        here, _ = layer(shard, sp=sp)
        gradients = list(torch.autograd.grad(here.square().sum(), [shard, *layer.parameters()]))
        for gradient in gradients[1:]:
            dist.all_reduce(gradient)
        references = [sp.shard(expected[0]), *expected[1:]]
        return max(
            relative_error(here, sp.shard(y.detach())),
            *(relative_error(a, b) for a, b in zip(gradients, references, strict=True)),
        )

    assert max(run(2, work)) < 1e-11


def test_decays_stay_fp32_and_start_slow():
    """A bf16 model keeps them too; at the start, steps of a zero input lie in Mamba-2's range."""
    gate = SteppedDecay(64)
    step, log_decay = gate(torch.zeros(1, 1, 64))
    assert step.min() >= 1e-3 and step.max() <= 0.1 and torch.all(log_decay <= -1e-3) and torch.all(log_decay >= -1.6)
    assert gate.bfloat16()(torch.zeros(1, 1, 64, dtype=torch.bfloat16))[1].dtype == torch.float32


def test_the_generator_decides():
    values = []
    for _ in range(2):
        gate = SteppedDecay(3, 2)
        gate.reset_parameters(torch.Generator().manual_seed(5))
        values.append(torch.cat([gate.log_rate, gate.bias]))
    assert torch.equal(*values) and not torch.equal(values[0][:3], SteppedDecay(3, 2).log_rate)


def test_messages() -> None:
    sizes: dict[str, Any] = {"num_heads": 4, "key_dim": 3, "value_dim": 5}
    with pytest.raises(ValueError, match="num_key_heads must divide num_heads 4, got 3"):
        DeltaNet.Config(**sizes, num_key_heads=3)
    with pytest.raises(ValueError, match="unknown learned_decay 'scalar'; known: none, head, channel"):
        DeltaNet.Config(**sizes, learned_decay="scalar")
    (layer, x), (other, _) = layer_and_input("deltanet"), layer_and_input("gla")
    with pytest.raises(ValueError, match="state must be one that a DeltaNet gave, got Tensor"):
        layer(x, state=other(x, output_state=True)[1])
    with pytest.raises(ValueError, match="a GatedLinearAttention gave, got RecurrentState"):
        other(x, state=layer(x, output_state=True)[1])
