"""Presets: published sizes, counted without allocating; the configuration's checks."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lasp.layers import LRPE, MIXERS, ShortConvolution
from lasp.layers.gates import SteppedDecay
from lasp.layers.parameters import decaying_parameters
from lasp.models import NAMES, CausalLM, ModelConfig, mixer_table, num_parameters, parameter_table, preset
from lasp.models.presets import sizes

# Counted by hand from the papers' shapes: embedding + layers * (attention + feed-forward + norms) (+ LRPE's theta).
EXPECTED = {
    ("transnormer", "tiny"): 257 * 128 + 4 * (5 * 128**2 + 3 * 128 * 352) + 128,
    ("transnormer", "0.4b"): 50272 * 1024 + 24 * (5 * 1024**2 + 3 * 1024 * 2816) + 1024,
    ("transnormer", "1b"): 64000 * 2048 + 16 * (5 * 2048**2 + 3 * 2048 * 5632) + 2048,
    ("retnet", "1b"): 64000 * 2048 + 24 * (8 * 2048**2 + 4 * 2048**2 + 2 * 2048) + 2048,
    ("linear-transformer", "0.4b"): 50272 * 1024 + 24 * (4 * 1024**2 + 8 * 1024**2 + 4 * 1024) + 2 * 1024,
    # q, k at half width, v, gate, output; decays of rank 16 with a bias; a norm per head.
    ("gla", "1b"): 2 * 32000 * 2048
    + 24 * (4 * 2048**2 + 16 * (2048 + 1024) + 1024 + 512 + 3 * 2048 * 5632 + 2 * 2048)
    + 2048,
    # 16 heads of 128: q, k, v, output; a convolution of width 4 over q, k, v; beta; a norm per head.
    ("deltanet", "1b"): 2 * 32000 * 2048
    + 24 * (4 * 2048**2 + 3 * 2048 * 4 + 16 * 2048 + 128 + 3 * 2048 * 5632 + 2 * 2048)
    + 2048,
    # 6 heads, K = 256, V = 512: q, k of 1536, v, gate, output of 3072; beta, decay with its rate and bias.
    ("gated-deltanet", "1b"): 2 * 32000 * 2048
    + 21 * (6 * 2048**2 + (2 * 1536 + 3072) * 4 + 2 * 6 * 2048 + 12 + 512 + 3 * 2048 * 5632 + 2 * 2048)
    + 2048,
    # 18 layers of 16 heads of 128: q, k, v, output; convolution; beta; decay and gate of rank 128, one bias each; rate;
    # norm. 6 softmax layers with 4 key heads.
    ("kda", "1b"): 2 * 32000 * 2048
    + 24 * (3 * 2048 * 5632 + 2 * 2048)
    + 18 * (4 * 2048**2 + 3 * 2048 * 4 + 16 * 2048 + 2 * (2 * 2048 * 128 + 2048) + 16 + 128)
    + 6 * (2 * 2048**2 + 2 * 2048 * 4 * 128)
    + 2048,
    # z, x of 4096, B, C of 128, dt of 64 heads; convolution with bias over x, B, C; A, D, bias of dt; norm; output.
    ("mamba2", "1b"): 50288 * 2048
    + 48 * (2048 * (2 * 4096 + 2 * 128 + 64) + 5 * (4096 + 256) + 3 * 64 + 4096 + 4096 * 2048 + 2048)
    + 2048,
    # 12 linear layers with an output gate; 4 softmax layers with 8 key heads for 32 query heads of 64.
    ("hybrid", "1b"): 128256 * 2048
    + 16 * (3 * 2048 * 8192 + 2 * 2048)
    + 12 * 5 * 2048**2
    + 4 * (2 * 2048**2 + 2 * 2048 * 8 * 64)
    + 2048,
}


@pytest.mark.parametrize(("name", "size"), EXPECTED)
def test_parameter_counts(name, size):
    assert num_parameters(preset(name, size)) == EXPECTED[name, size]


@pytest.mark.parametrize("table", [parameter_table, mixer_table])
def test_the_documented_tables_are_what_is_registered(table):
    docs = Path(__file__).parents[2] / "docs"
    written = table()
    assert any(written in page.read_text() for page in docs.rglob("*.md")), "python docs/tables.py writes them"


@pytest.mark.parametrize("name", NAMES)
def test_tiny_models_are_tiny_and_configurations_are_json(name):
    config = preset(name, "tiny")
    assert 0.8e6 < num_parameters(config) < 1e6
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    untied = preset(name, "tiny", tied_embeddings=False)
    assert num_parameters(untied) == num_parameters(config) + 257 * 128


def test_every_mixer_can_be_made():
    """By a family each; every name of a mixer stands for a configuration of its own."""
    assert {MIXERS[name].config.kind for name in MIXERS} == {
        each.kind for name in NAMES for each in preset(name, "tiny").mixers
    }
    made = [preset("deltanet", "tiny", mixer=name).mixer for name in MIXERS if name != "linear-attention"]
    assert len(set(made)) == len(made)


def test_lrpe_is_in_the_first_layer_only_and_decay_slows_with_depth():
    config = preset("transnormer", "tiny")
    layers = [config.build_mixer(layer) for layer in range(4)]
    assert [isinstance(layer.positions, LRPE) for layer in layers] == [True, False, False, False]
    assert [layer.decay.values[0] for layer in layers] == [-0.25, -0.1875, -0.125, -0.0625]
    assert preset("linear-transformer", "tiny").build_mixer(0).decay is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("gpt", "tiny"), "unknown model name 'gpt'; known: linear-transformer, transnormer, retnet"),
        (lambda: preset("retnet", "3b"), "unknown size '3b' of retnet; known: tiny, 0.4b, 1b, 7b"),
        (lambda: preset("retnet", "tiny", heads=2), "no field heads; it has vocab_size, d_model"),
        (lambda: preset("retnet", "tiny", num_heads=0), "num_heads must be a whole number >= 1, got 0"),
        (lambda: preset("retnet", "tiny", decay="alibi"), "unknown decay 'alibi'; known: none, transnormer, retnet"),
        (lambda: preset("retnet", "tiny", key_dim=31), "rotary positions need an even key_dim, got 31"),
        (lambda: preset("retnet", "tiny", init_std=0.0), "init_std must be > 0, got 0.0"),
        (lambda: preset("linear-transformer", "tiny", feature_map="silu"), "use one of elu\\+1, hedgehog, relu"),
        (lambda: preset("linear-transformer", "tiny", positions="rotary"), "use positions 'none' here"),
        (lambda: preset("kda", "7b"), "unknown size '7b' of kda; known: tiny"),
        (lambda: preset("retnet", "tiny", mixer="rwkv"), "unknown mixer 'rwkv'; known: linear-attention, deltanet"),
        (lambda: preset("gla", "tiny", decay="retnet"), "mixer 'gla' settles decay itself"),
        (lambda: preset("gla", "tiny", num_key_heads=2), "leave num_key_heads None"),
        (lambda: preset("kda", "tiny", num_key_heads=3), "num_key_heads must divide num_heads 4, got 3"),
    ],
)
def test_configuration_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def matrices(model: nn.Module) -> set[str]:
    """By the kind of their module: what projects, embeds or convolves."""
    kinds = (nn.Linear, nn.Embedding, ShortConvolution)
    return {f"{prefix}.weight" for prefix, module in model.named_modules() if isinstance(module, kinds)}


def moved_by_a_cast(model: nn.Module) -> set[str]:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    cast = model.to(torch.bfloat16).named_parameters()
    return {name for name, parameter in cast if not torch.equal(parameter.double(), before[name].double())}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_say_whether_they_decay_and_in_which_dtype_they_live(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Angles and learned decays are no weight matrices, whatever their shape, and no cast moves them."""
    for size in sizes(name):
        with torch.device("meta"):
            model = CausalLM(preset(name, size, num_layers=4))
        assert {name for name, _ in decaying_parameters(model)} == matrices(model)
    model = CausalLM(preset(name, "tiny", num_layers=4))
    exact = {name for name, _ in model.named_parameters() if name.endswith((".theta", ".log_rate", ".decay.bias"))}
    assert exact == {
        name for name, _ in CausalLM(model.config).bfloat16().named_parameters() if _.dtype != torch.bfloat16
    }
    assert not exact & moved_by_a_cast(model)
    for module in (LRPE, SteppedDecay):
        monkeypatch.setattr(module, "exact", ())
    broken = CausalLM(model.config)
    assert bool(exact) == bool(exact & moved_by_a_cast(broken))
