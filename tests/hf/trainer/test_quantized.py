"""QLoRA on a split model: frozen weights in 4 bits stay as they are, and LoRA's gradients are those of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import world
from hf.small_models import build, tokens
from tolerances import relative_error

import lasp
import lasp.hf

IDS = tokens(2, 61)
BATCH = {"input_ids": IDS, "labels": IDS}


def quantized(folder: Path) -> Any:
    """The model of a folder, its linear layers in 4 bits, with LoRA on all of them."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32)
    recomputed = {"use_reentrant": False}
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=recomputed
    )
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and so would be the gradient of the others
            torch.nn.init.normal_(parameter)
    return model


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_four_bits(model: Any) -> dict[str, torch.Tensor]:
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    return {name: module.weight.detach().clone() for name, module in layers.items()}


@pytest.mark.parametrize("kind", ["qwen3_next", "minimax"])
def test_lora_on_four_bits(kind: str, tmp_path: Path) -> None:
    """The control: a rank by itself has other gradients."""
    build(kind, torch.float32).save_pretrained(tmp_path)

    def work(rank: int) -> tuple[float, float]:
        sp, model = lasp.SequenceParallel(dist.group.WORLD), quantized(tmp_path)
        weights, whole = in_four_bits(model), gradients(model, BATCH)
        assert weights and all(weight.dtype is torch.uint8 for weight in weights.values())
        lasp.hf.parallelize(model, sp)
        found = gradients(model, lasp.hf.shard(BATCH, sp, (25, 36)))
        assert found.keys() == whole.keys() and all("lora" in name for name in found)
        averaged = {name: sp.sum(gradient) / 2 for name, gradient in found.items()}
        assert lasp.hf.check(model, sp).passes
        lasp.hf.restore(model)
        after = in_four_bits(model)
        assert all(torch.equal(after[name], weight) for name, weight in weights.items())
        return tuple(max(relative_error(got[name], whole[name]) for name in whole) for got in (averaged, found))  # type: ignore[return-value]

    for error, alone in world.run(2, work, deadline_s=300):
        assert error < 1e-4 and alone > 1e-1
