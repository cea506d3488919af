"""Constant decays per head: the published schedules, and a module that keeps them exact under any cast.

h = head, counted from 0; H = heads; l = layer, counted from 0; L = layers. All values are natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lasp.layers.fields import check_counts
from lasp.sequence.arguments import number, whole


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8 (h+1) / H) where H is a power of two; else those of the next lower power, filled up from the next higher.

    Source: Press et al., "Train short, test long" (ALiBi); TransNormerLLM's released code uses the same values.
    """
    check_counts(num_heads=num_heads)
    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / lower) for head in range(lower)]
    if lower < num_heads:
        slopes += alibi_slopes(2 * lower)[0::2][: num_heads - lower]
    return slopes


def transnormer_log_decay(num_heads: int, layer: int, num_layers: int) -> list[float]:
    """-slope_h * (1 - l / L): later layers look further back (TransNormerLLM, section 3.1.1).

    The released code divides by L - 1 and adds 1e-5 instead, which leaves its last layer all but undecayed.
    """
    _check_layer(layer, num_layers)
    return [-slope * (1 - layer / num_layers) for slope in alibi_slopes(num_heads)]


def retnet_log_decay(num_heads: int, layer: int, num_layers: int) -> list[float]:
    """log(1 - 2^(-5-h)), the same in every layer (RetNet, section 2.2)."""
    check_counts(num_heads=num_heads)
    _check_layer(layer, num_layers)
    return [math.log1p(-(2.0 ** (-5 - head))) for head in range(num_heads)]


def _check_layer(layer: int, num_layers: int) -> None:
    if whole("layer", layer, 0) >= whole("num_layers", num_layers, 1):
        raise ValueError(f"layer must be below num_layers = {num_layers}, got {layer}")


DECAYS: dict[str, Callable[[int, int, int], list[float]] | None] = {
    "none": None,
    "transnormer": transnormer_log_decay,
    "retnet": retnet_log_decay,
}


class ConstantDecay(nn.Module):
    """Log decays [H] that no cast can round: bf16(0.999) is 1, so a model.bfloat16() must not touch them.

    The fp64 buffer is rebuilt from the Python numbers whenever the module is moved or cast. It is neither
    stored in checkpoints nor left undefined by to_empty(): the configuration determines it.
    """

    log_decay: Tensor

    def __init__(self, log_decay: Sequence[float]) -> None:
        super().__init__()
        self.values = tuple(number("log_decay", value, "<= 0", lambda value: value <= 0) for value in log_decay)
        self.register_buffer("log_decay", torch.tensor(self.values, dtype=torch.float64), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConstantDecay:
        super()._apply(fn, recurse)
        self.log_decay = torch.tensor(self.values, dtype=torch.float64, device=self.log_decay.device)
        return self

    def scale(self, factor: float) -> None:
        """Multiply the decays by `factor` >= 0, for good: below 1, the layer looks further back."""
        factor = number("factor", factor, "a number >= 0", lambda factor: 0 <= factor < math.inf)
        self.values = tuple(value * factor if factor else 0.0 for value in self.values)
        self.log_decay = torch.tensor(self.values, dtype=torch.float64, device=self.log_decay.device)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The log decays [H] in `dtype`, which is the state's: fp32, or fp64 for fp64 inputs."""
        return self.log_decay.to(dtype)
