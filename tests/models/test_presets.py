"""Presets: published sizes, counted without allocating; the configuration's checks."""

import dataclasses
import json
from pathlib import Path

import pytest

from lasp.models import NAMES, ModelConfig, num_parameters, parameter_table, preset

# Counted by hand from the papers' shapes: embedding + layers * (attention + feed-forward + norms) (+ LRPE's theta).
EXPECTED = {
    ("transnormer", "tiny"): 257 * 128 + 4 * (5 * 128**2 + 3 * 128 * 352) + 128,
    ("transnormer", "0.4b"): 50272 * 1024 + 24 * (5 * 1024**2 + 3 * 1024 * 2816) + 1024,
    ("transnormer", "1b"): 64000 * 2048 + 16 * (5 * 2048**2 + 3 * 2048 * 5632) + 2048,
    ("retnet", "1b"): 64000 * 2048 + 24 * (8 * 2048**2 + 4 * 2048**2 + 2 * 2048) + 2048,
    ("linear-transformer", "0.4b"): 50272 * 1024 + 24 * (4 * 1024**2 + 8 * 1024**2 + 4 * 1024) + 2 * 1024,
}


@pytest.mark.parametrize(("name", "size"), EXPECTED)
def test_parameter_counts(name, size):
    assert num_parameters(preset(name, size)) == EXPECTED[name, size]


def test_the_documented_table_is_the_counted_one():
    docs = Path(__file__).parents[2] / "docs" / "models.md"
    assert parameter_table() in docs.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_tiny_models_are_tiny_and_configurations_are_json(name):
    config = preset(name, "tiny")
    assert 0.8e6 < num_parameters(config) < 1e6
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    untied = preset(name, "tiny", tied_embeddings=False)
    assert num_parameters(untied) == num_parameters(config) + 257 * 128


def test_lrpe_is_in_the_first_layer_only_and_decay_slows_with_depth():
    config = preset("transnormer", "tiny")
    assert [config.layer_positions(layer) for layer in range(4)] == ["lrpe", "none", "none", "none"]
    assert [config.layer_log_decay(layer)[0] for layer in range(4)] == [-0.25, -0.1875, -0.125, -0.0625]
    assert preset("linear-transformer", "tiny").layer_log_decay(0) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("gpt", "tiny"), "unknown model 'gpt'; known: linear-transformer, transnormer, retnet"),
        (lambda: preset("retnet", "3b"), "unknown size '3b' of retnet; known: tiny, 0.4b, 1b, 7b"),
        (lambda: preset("retnet", "tiny", heads=2), "no field heads; it has vocab_size, d_model"),
        (lambda: preset("retnet", "tiny", num_heads=0), "num_heads must be a whole number >= 1, got 0"),
        (lambda: preset("retnet", "tiny", decay="alibi"), "unknown decay 'alibi'; known: none, transnormer, retnet"),
        (lambda: preset("retnet", "tiny", key_dim=31), "rotary positions need an even key_dim, got 31"),
        (lambda: preset("retnet", "tiny", init_std=0.0), "init_std must be > 0, got 0.0"),
        (lambda: preset("linear-transformer", "tiny", feature_map="silu"), "use one of elu\\+1, hedgehog, relu"),
        (lambda: preset("linear-transformer", "tiny", positions="rotary"), "use positions 'none' here"),
    ],
)
def test_configuration_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
