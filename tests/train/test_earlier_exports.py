"""Exports of an earlier version, one of each family: they load, give the same logits, and their options build them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lasp.errors import CheckpointError
from lasp.models import CausalLM, ModelConfig, preset
from lasp.train.checkpoint import export
from lasp.train.checkpoint.shards import refuse_other_model

FOLDER = Path(__file__).parent / "earlier_exports"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_an_earlier_export_is_the_same_model(name: str) -> None:
    about = export.verify(FOLDER / name)
    stored = about["model_config"]
    assert isinstance(stored["mixer"], str), "a form that is no longer written"
    config = ModelConfig.from_dict(stored)
    options = export.model_options(FOLDER / name)
    assert options.overrides and options.build() == config, "the names of its overrides are known"
    model = CausalLM(config)
    tokens = torch.arange(12)[None] * 7 % 257

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(tokens).logits[0, -1, :6]

    expected = torch.tensor(EXPECTED[name])
    assert not torch.allclose(logits(), expected, rtol=1e-4, atol=1e-5), "the control: other weights"
    export.load_weights(FOLDER / name, model)
    torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-5)
    # Today's form is compared with it field by field, but for how softmax layers exchange.
    refuse_other_model(FOLDER, stored, config.to_dict())
    refuse_other_model(FOLDER, {**stored, "softmax_method": "ulysses"}, config.to_dict())
    with pytest.raises(CheckpointError, match="written by another model"):
        refuse_other_model(FOLDER, {**stored, "num_layers": 3}, config.to_dict())


@pytest.mark.parametrize("name", EXPECTED)
def test_todays_form_says_the_mixer_and_reads_back(name: str) -> None:
    config = ModelConfig.from_dict(export.read(FOLDER / name)["model_config"])
    written = json.loads(json.dumps(config.to_dict()))
    assert written["mixer"] == [each.to_dict() for each in config.mixers] or written["mixer"] == config.mixer.to_dict()  # type: ignore[union-attr]
    assert ModelConfig.from_dict(written) == config


def test_settings_that_a_mixer_does_not_have() -> None:
    """Settings that did nothing still do; others are refused, but as they are by default."""
    retnet = preset("retnet", "tiny")
    assert preset("retnet", "tiny", conv_width=3, negative_eigenvalues=True, softmax_method="ulysses") == retnet
    assert preset("retnet", "tiny", num_key_heads=None, num_kv_heads=None) == retnet
    with pytest.raises(ValueError, match="settles num_key_heads itself"):
        preset("retnet", "tiny", num_key_heads=2)
    assert preset("kda", "tiny", decay="none", positions="none") == preset("kda", "tiny")
