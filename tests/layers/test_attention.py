"""The attention layer of every preset against quadratic attention, written out with its T x T score matrix."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from world import run

import lasp
from lasp.layers import LayerContext, LinearAttention
from lasp.models import CausalLM, preset

T = 29
START = 1000


def layer_and_input(name, layer, dtype=torch.float64):
    torch.manual_seed(0)
    model = CausalLM(preset(name, "tiny")).to(dtype)
    return model.blocks[layer].attention, torch.randn(2, T, 128, dtype=dtype)


def quadratic(layer, x, *, decay=1.0, masked=True):
    """softmax attention's shape with the layer's scores in place of the exponentials."""
    split = (layer.num_heads, -1)
    q = layer.q_map(layer.q_proj(x).unflatten(-1, split))
    k = layer.k_map(layer.k_proj(x).unflatten(-1, split))
    v = layer.v_proj(x).unflatten(-1, split)
    if layer.positions is not None:
        q, k = layer.positions(q, k, START)
    scores = layer.scale * torch.einsum("bthk,bshk->bhts", q, k)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    if layer.decay is not None:
        scores = scores * (decay * layer.decay(x.dtype)[:, None, None] * distance).exp()
    if masked:
        scores = scores * (distance >= 0)
    if layer.normalization == "denominator":
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-6)
    o = torch.einsum("bhts,bshv->bthv", scores, v)
    if layer.normalization == "hidden":
        o = o.flatten(-2)
    if layer.normalization != "denominator":
        o = o / (o.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
    o = o.reshape(2, T, -1)
    if layer.gate is not None:
        gate = layer.gate_proj(x)
        o = o * (F.silu(gate) if layer.normalization == "head" else gate)
    return o @ layer.out_proj.weight.T


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["linear-transformer", "transnormer", "retnet"])
@pytest.mark.parametrize("layer", [0, 3])
def test_layer_equals_quadratic_attention(name, layer):
    attention, x = layer_and_input(name, layer)
    with torch.no_grad():
        y, state = attention(x, start=START)
        assert state is None
        assert error(y, quadratic(attention, x)) < 1e-12
        assert error(y, quadratic(attention, x, masked=False)) > 1e-3
        assert error(y, quadratic(attention, x.roll(1, 1))) > 1e-3
        if attention.decay is not None:
            assert error(y, quadratic(attention, x, decay=0.99)) > 1e-4


def test_the_first_head_norms_its_own_channels_only():
    """RetNet's norm is per head: scaling one head's values changes no other head; TransNormerLLM's is not."""
    for name, others_change in (("retnet", False), ("transnormer", True)):
        attention, x = layer_and_input(name, 0)
        attention.out_proj = torch.nn.Identity()
        with torch.no_grad():
            before = attention(x)[0].unflatten(-1, (4, -1))
            attention.v_proj.weight[: attention.value_dim] *= 3
            after = attention(x)[0].unflatten(-1, (4, -1))
        assert (error(after[:, :, 1:], before[:, :, 1:]) > 1e-2) == others_change


@pytest.mark.parametrize("positions", ["none", "lrpe"])
def test_state_has_the_announced_size(positions):
    config, context = LinearAttention.Config(num_heads=2, key_dim=4, value_dim=3, positions=positions), LayerContext(8)
    _, state = config.build(context)(torch.randn(5, 7, 8), output_state=True)
    operator = config.cost(context).operator
    assert state.shape == (5, operator.num_heads, operator.key_dim, operator.value_dim) and state.dtype == torch.float32
    assert state[0].numel() == operator.state_numbers


def test_learned_features_train_through_the_denominator():
    layer = LinearAttention.Config(
        num_heads=2, key_dim=4, value_dim=4, feature_map="hedgehog", normalization="denominator"
    ).build(LayerContext(8))
    y, _ = layer(torch.randn(2, 7, 8))
    y.square().sum().backward()
    assert layer.q_map.weight.grad.norm() > 0 and layer.k_map.weight.grad.norm() > 0


def test_errors_say_what_to_do():
    sizes = {"num_heads": 2, "key_dim": 4, "value_dim": 4}
    with pytest.raises(ValueError, match="use one of elu\\+1, hedgehog, relu"):
        LinearAttention.Config(**sizes, feature_map="silu", normalization="denominator")
    with pytest.raises(ValueError, match="use positions 'none' here"):
        LinearAttention.Config(**sizes, feature_map="relu", positions="rotary", normalization="denominator")
    with pytest.raises(ValueError, match="unknown gate 'tanh'; known: none, linear, silu, sigmoid"):
        LinearAttention.Config(**sizes, gate="tanh")
    with pytest.raises(ValueError, match="one value for each of 2 heads, got 3"):
        LinearAttention.Config(**sizes, decay=(-1.0, -1.0, -1.0))


@pytest.mark.parametrize("name", ["transnormer", "retnet"])
def test_positions_over_ranks_are_the_sequences(name):
    attention, x = layer_and_input(name, 0)
    with torch.no_grad():
        expected = attention(x)[0]

    def rank(_):
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=(T - 9, 9))
        with torch.no_grad():
            y, as_if_first = (attention(sp.shard(x), sp=sp, **start)[0] for start in ({}, {"start": 0}))
        return error(y, sp.shard(expected)), error(as_if_first, sp.shard(expected))

    found = run(2, rank)
    assert max(right for right, _ in found) < 1e-12
    assert found[1][1] > 1e-3  # the second rank's tokens at the first's places
