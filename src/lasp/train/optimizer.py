"""AdamW with weight decay on weight matrices only, and its learning rate: warm-up, then cosine."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from lasp.layers.parameters import decaying_parameters
from lasp.parallelize import ParallelModel
from lasp.train.config import OptimizerOptions


def build_optimizer(model: ParallelModel, options: OptimizerOptions) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of `model`; those decay that lasp.layers.parameters says so of.

    With zero1, a ZeroRedundancyOptimizer over it: each process steps a share of the parameters and sends them round.
    """
    parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    decaying = {parameter for _, parameter in decaying_parameters(model.module)}
    matrices = [parameter for parameter in parameters if parameter in decaying]
    others = [parameter for parameter in parameters if parameter not in decaying]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    settings: dict[str, Any] = {
        "lr": options.lr,
        "betas": (options.beta1, options.beta2),
        "eps": options.eps,
        "fused": True,
    }
    if model.data_parallel == "zero1" and model.num_processes > 1:
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)
    return torch.optim.AdamW(groups, **settings)


def clip(model: ParallelModel, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Let the optimizer's next step take gradients scaled so that their norm over all parameters is at most `max_norm`.

    AdamW divides them where it reads them, which saves a pass over all gradients; those of other optimizers, or spread
    over processes, are scaled here.

    Returns:
        the norm before, a scalar.
    """
    gradients = [parameter.grad for parameter in model.module.parameters() if parameter.grad is not None]
    inner = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    if type(inner) is not torch.optim.AdamW or any(isinstance(gradient, DTensor) for gradient in gradients):
        return model.clip_gradients(max_norm)
    norm = torch.nn.utils.get_total_norm(gradients)
    # As PyTorch's clipping has it.
    inner.grad_scale = ((norm.float() + 1e-6) / max_norm).clamp(min=1.0)  # type: ignore[attr-defined]
    return norm


def learning_rate(step: int, num_steps: int, options: OptimizerOptions) -> float:
    """The rate of optimizer step `step` (from 0) in a schedule of `num_steps`: linear from 0 to lr, then cosine down to
    lr * min_lr_ratio, where it stays."""
    warmup = options.warmup(num_steps)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    span = max(1, num_steps - warmup)
    progress = min(1.0, (step - warmup + 1) / span)
    low = options.min_lr_ratio
    return options.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
