"""Initial weights, as the papers have them, from one generator and nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lasp.layers import ShortConvolution, SteppedDecay
from lasp.models.config import ModelConfig

# RetNet's gains for the projections that enter retention; those that leave it and the feed-forward layer have 1.
_RETNET_GAIN = 2**-2.5
_RETNET_SMALL = ("q_proj", "k_proj", "v_proj", "gate_proj")


def initialize(model: nn.Module, config: ModelConfig, generator: torch.Generator | None) -> None:
    """Set all parameters of a CausalLM.

    "normal" (TransNormerLLM's released code): every matrix and the embedding from N(0, init_std^2).
    "xavier" (RetNet's released code): uniform Xavier, with gain 2^-2.5 for q, k, v and gate and 1 elsewhere;
    embedding and output projection from N(0, 1 / d_model).
    Norms start at gain 1 and bias 0; LRPE's angles, learned feature maps and short convolutions where their
    modules say.

    Numbers are drawn on the generator's device (the CPU by default) in the order of the model's modules, then
    copied: the same generator gives the same weights on every device and on every rank.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and name == "head"):
                std = config.init_std if config.init == "normal" else config.d_model**-0.5
                _normal(module.weight, std, generator)
            elif isinstance(module, nn.Linear):
                if module.bias is not None:
                    module.bias.zero_()
                if config.init == "normal":
                    _normal(module.weight, config.init_std, generator)
                else:
                    gain = _RETNET_GAIN if name.rsplit(".", 1)[-1] in _RETNET_SMALL else 1.0
                    _xavier(module.weight, gain, generator)
            elif isinstance(module, (ShortConvolution, SteppedDecay)):
                module.reset_parameters(generator)
            elif any(True for _ in module.parameters(recurse=False)):
                module.reset_parameters()  # type: ignore[operator]


def _draw_device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    drawn = torch.empty(weight.shape, dtype=torch.float32, device=_draw_device(generator))
    weight.copy_(drawn.normal_(0.0, std, generator=generator))


def _xavier(weight: Tensor, gain: float, generator: torch.Generator | None) -> None:
    bound = gain * math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
    drawn = torch.empty(weight.shape, dtype=torch.float32, device=_draw_device(generator))
    weight.copy_(drawn.uniform_(-bound, bound, generator=generator))
