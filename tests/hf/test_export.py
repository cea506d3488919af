"""Our Mamba-2 as a folder of transformers, and theirs as a start for ours: the same logits, the same ids."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import relative_error

from lasp.data.tokenizer import ByteTokenizer
from lasp.errors import CheckpointError, ConfigError
from lasp.models import CausalLM, ModelConfig
from lasp.models.presets import preset
from lasp.train.checkpoint import export, transformers_folder

SIZES = {
    "d_model": 32, "num_layers": 2, "num_heads": 4, "value_dim": 16, "key_dim": 8, "num_key_heads": 2, "norm_eps": 1e-4,
}  # fmt: skip
IDS = torch.randint(257, (2, 50), generator=torch.Generator().manual_seed(0))


def model(**options: Any) -> CausalLM:
    """A model with slow decays, whose gains and skips are not one, as they are at first."""
    torch.manual_seed(0)
    found = CausalLM(preset("mamba2", "tiny", vocab_size=257, **(SIZES | options)))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "decay" in name:
                parameter.copy_(torch.linspace(-3, -1, parameter.numel()))
            else:
                parameter.mul_(3.0).add_(0.1 * torch.randn_like(parameter))
    return found


def groups() -> int:
    """Returns two where transformers normalizes them one by one, as from 5.23 on."""
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    return 2 if "group_size" in inspect.signature(MambaRMSNormGated).parameters else 1


@pytest.mark.ci
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same(tied: bool, tmp_path: Path) -> None:
    """Logits to 1e-6; the control is a weight of the convolution read backwards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = model(tied_embeddings=tied, num_key_heads=groups())
    transformers_folder.write(tmp_path, ours, ByteTokenizer())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Mamba2ForCausalLM" and theirs.dtype == torch.float32
    with torch.no_grad():
        expected = ours(IDS).logits
        assert relative_error(theirs(IDS).logits, expected) < 1e-6
        weight = theirs.backbone.layers[0].mixer.conv1d.weight
        weight.copy_(weight.flip(-1).clone())
        assert relative_error(theirs(IDS).logits, expected) > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "bytes: \x00 é 日本 \t\n  <>"
    assert tokenizer(text).input_ids == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)
    # And back, to the bit.
    config = export.model_options(tmp_path).build()
    assert config == ModelConfig.from_dict(export.read(tmp_path)["model_config"]) == ours.config
    assert export.tokenizer(tmp_path).name == "bytes"
    again = CausalLM(config)
    export.load_weights(tmp_path, again)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters(), strict=True))


@pytest.mark.ci
def test_a_model_of_transformers_in_several_files_of_bf16(tmp_path: Path) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": groups(), "conv_kernel": 3, "hidden_size": 32}
    theirs = Mamba2ForCausalLM(Mamba2Config(vocab_size=257, num_hidden_layers=2, **sizes)).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        export.read(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(transformers_folder.byte_tokenizer())
    ours = CausalLM(export.model_options(tmp_path).build())
    export.load_weights(tmp_path, ours)
    with torch.no_grad():
        assert relative_error(ours(IDS).logits, theirs.float()(IDS).logits) < 2e-6


def test_what_the_other_does_not_have_is_refused(tmp_path: Path) -> None:
    of_groups, of_one = (
        preset("mamba2", "tiny", vocab_size=257, **(SIZES | {"num_key_heads": groups})) for groups in (2, 1)
    )
    assert transformers_folder.needs_newer(of_groups) and not transformers_folder.needs_newer(of_one)
    for config, message in (
        (preset("gla", "tiny", vocab_size=257), "takes models of the family mamba2, this one has layers of gla"),
        (preset("mamba2", "tiny", vocab_size=257, **SIZES, ffn="relu", ffn_dim=32), "Mamba-2 has no ffn 'relu'"),
        (preset("mamba2", "tiny", vocab_size=257, **{**SIZES, "d_model": 48}), "64 is no multiple of d_model 48"),
    ):
        with pytest.raises(ConfigError, match=message):
            transformers_folder.check(config)
    for about, message in (
        ({"model_type": "llama"}, "type 'llama': only 'mamba2' is read"),
        ({"model_type": "mamba2", "use_bias": True}, "has use_bias True"),
        ({"model_type": "mamba2", "time_step_limit": [0.0, 1.0]}, "has time_step_limit"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(about))
        with pytest.raises(CheckpointError, match=message):
            export.read(tmp_path)
