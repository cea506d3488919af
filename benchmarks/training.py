"""A model to be trained, and a step of training, as benchmarks of whole models take them."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.models import CausalLM, ModelConfig
from lasp.parallelize import ParallelModel
from lasp.train.optimizer import clip


def new_module(config: ModelConfig, device: torch.device, generator: torch.Generator) -> CausalLM:
    """The model with random weights, made where it is to be."""
    with torch.device("meta"):
        module = CausalLM(config)
    module.to_empty(device=device)
    module.init_weights(generator)
    return module


def train_on(model: ParallelModel, optimizer: torch.optim.Optimizer, sequence: Tensor, *, bf16: bool) -> Tensor:
    """Make a step on a sequence [1, n + 1]: forward, backward, clipping, optimizer. Returns the sum of its n losses."""
    with torch.autocast(sequence.device.type, torch.bfloat16, enabled=bf16):
        out = model.training(sequence[:, :-1], labels=sequence[:, 1:].contiguous())
    model.mean_loss(out.loss_sum, sequence.shape[1] - 1).backward()
    clip(model, optimizer, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return out.loss_sum.detach()
