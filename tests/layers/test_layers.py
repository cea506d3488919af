"""Feature maps, norms, gated units and decays, each against its formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from lasp.layers import (
    FEATURE_MAPS,
    ConstantDecay,
    RMSNorm,
    SimpleRMSNorm,
    alibi_slopes,
    feature_map,
    feedforward,
    norm,
    retnet_log_decay,
    transnormer_log_decay,
)
from lasp.layers.feature_maps import NON_NEGATIVE


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps(name):
    x = random(1, 5, 2, 4)
    phi = feature_map(name, 2, 4).double()
    y = phi(x)
    assert y.shape == (1, 5, 2, phi.dim_out) and y.dtype == x.dtype
    if name in NON_NEGATIVE:
        assert (y >= 0).all()
    expected = {
        "identity": x,
        "elu+1": torch.where(x > 0, x + 1, x.exp()),
        "relu": x.clamp(min=0),
        "silu": x / (1 + (-x).exp()),
        "hedgehog": torch.cat((x.exp(), (-x).exp()), -1) / (x.exp() + (-x).exp()).sum(-1, keepdim=True),
    }[name]
    torch.testing.assert_close(y, expected)


def test_what_elu_leaves_of_a_negative_number_has_all_its_digits():
    x = -random(1000).abs().bfloat16() * 3
    off = (feature_map("elu+1", 1, 1)(x).double() / x.double().exp() - 1).abs().max()
    assert off < 2**-8
    assert ((F.elu(x) + 1).double() / x.double().exp() - 1).abs().max() > 0.1, "the control: added in 16 bits"


def test_norms():
    x = random(3, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(SimpleRMSNorm(8, 1e-3)(x), expected)
    rms = RMSNorm(8, 1e-3).double()
    rms.weight.data = random(8)
    torch.testing.assert_close(rms(x), expected * rms.weight)
    # Statistics in fp32: 256 squares of 100 overflow nothing and keep bf16's own accuracy.
    large = torch.full((1, 256), 100.0, dtype=torch.bfloat16)
    assert torch.equal(SimpleRMSNorm(256, 1e-6)(large), torch.ones_like(large))


def test_gated_units():
    x = random(2, 4)
    for name, activation in {"sglu": lambda y: y, "swiglu": F.silu}.items():
        unit = feedforward(name, 4, 6).double()
        expected = (activation(x @ unit.gate.weight.T) * (x @ unit.up.weight.T)) @ unit.down.weight.T
        torch.testing.assert_close(unit(x), expected)


def test_decay_schedules():
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert transnormer_log_decay(8, 0, 4) == [-s for s in alibi_slopes(8)]
    assert transnormer_log_decay(8, 3, 4)[0] == -0.125
    assert [math.exp(g) for g in retnet_log_decay(3, 0, 1)] == pytest.approx([31 / 32, 63 / 64, 127 / 128], rel=1e-15)


def test_casts_keep_decays_exact():
    values = retnet_log_decay(8, 0, 1)
    for cast in (lambda m: m.bfloat16(), lambda m: m.half().double(), lambda m: m.to("meta").to_empty(device="cpu")):
        decay = cast(ConstantDecay(values))
        assert decay(torch.float64).tolist() == values
        assert torch.equal(decay(torch.float32), torch.tensor(values, dtype=torch.float32))
    assert torch.tensor(values, dtype=torch.bfloat16).exp()[-1] == 1  # what a rounded decay would have become
    assert not ConstantDecay(values).state_dict()


def test_scaled_decays_survive_a_move():
    decay = ConstantDecay([-0.5, -torch.inf])
    decay.scale(0.5)
    assert decay.bfloat16().to("meta").to_empty(device="cpu")(torch.float64).tolist() == [-0.25, -torch.inf]
    decay.scale(0.0)
    assert decay.float()(torch.float64).tolist() == [0, 0]


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"unknown feature map name 'exp'; known: identity, elu\+1"):
        feature_map("exp", 1, 1)
    with pytest.raises(ValueError, match="unknown norm name 'batch'; known: rmsnorm"):
        norm("batch", 1, 1e-6)
    with pytest.raises(ValueError, match="unknown ffn name 'glu'; known: sglu"):
        feedforward("glu", 1, 1)
    with pytest.raises(ValueError, match="must be <= 0"):
        ConstantDecay([0.1])
