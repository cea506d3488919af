"""LoRA on small models."""

from __future__ import annotations

from typing import Any

import torch


def lora(model: Any) -> Any:
    """The model with LoRA, whose second matrices are not zero, as they are at first: so is the first ones' gradient."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    found = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "out_proj"])).double()
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return found
