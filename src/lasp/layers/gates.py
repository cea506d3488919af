"""Learned decays: what turns a projection of the input into natural-log decays <= 0, and gated output norms.

All decays come in the state's dtype, fp32 or fp64: in 16 bits a decay of 0.999 is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.fields import check_activation, check_counts
from lasp.layers.fused import ACTIVATIONS, gated_norm, project_gated_norm
from lasp.layers.norms import RMSNorm
from lasp.layers.parameters import ExactParameters, exact_parameter
from lasp.layers.recomputed import recomputed
from lasp.recurrence.inputs import state_dtype
from lasp.sequence.arguments import check_flags, check_generator, number

# Mamba-2's initial ranges: of the rate A, and of the step dt, drawn evenly on a logarithmic scale.
RATES = (1.0, 16.0)
STEPS = (1e-3, 1e-1)
LEAST = {torch.float32: -17.0, torch.float64: -37.0}  # exp(x) is softplus(x) to half of its last bit below it


class SteppedDecay(ExactParameters):
    """dt = softplus(x + bias), log-decay -A dt, A = exp(log_rate) > 0: of Mamba-2, Gated DeltaNet and KDA.

    Args:
        num_heads: H; each has a rate of its own.
        channels: K decays a head, each with a bias of its own; 1 for a single one.
    """

    exact = ("log_rate", "bias")

    def __init__(self, num_heads: int, channels: int = 1) -> None:
        super().__init__()
        check_counts(num_heads=num_heads, channels=channels)
        self.num_heads = num_heads
        self.channels = channels
        self.log_rate = exact_parameter(num_heads)
        self.bias = exact_parameter(num_heads * channels)
        if not self.bias.is_meta:
            self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Rates uniform in RATES; biases such that a zero input gives steps spread over STEPS."""
        check_generator(generator)
        with torch.no_grad():
            self.log_rate.copy_(_drawn(self.num_heads, *RATES, generator).log())
            steps = _drawn(len(self.bias), math.log(STEPS[0]), math.log(STEPS[1]), generator).exp()
            self.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def scale(self, factor: float) -> None:
        """Multiply all log-decays by `factor` > 0."""
        factor = number("factor", factor, "a number > 0", lambda factor: 0 < factor < math.inf)
        with torch.no_grad():
            self.log_rate.add_(math.log(factor))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, H * channels] -> dt and log-decay, both [B, T, H], or [B, T, H, K] for K channels."""
        dtype = state_dtype(x.dtype)
        dt = F.softplus(x.to(dtype) + self.bias.to(dtype))
        rate = self.log_rate.to(dtype).exp()
        if self.channels > 1:
            dt, rate = dt.unflatten(-1, (self.num_heads, self.channels)), rate[:, None]
        return dt, -rate * dt

    def logarithms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, H] -> log(dt) and log-decay, both [B, T, H], of a single channel."""
        dtype = state_dtype(x.dtype)
        x = x.to(dtype) + self.bias.to(dtype)
        # Where softplus is next to nothing, x is its logarithm.
        log_step = F.softplus(x.clamp(min=LEAST[dtype])).log() - F.relu(LEAST[dtype] - x)
        return log_step, -self.log_rate.to(dtype).exp() * F.softplus(x)


def _drawn(count: int, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    """Uniform values, drawn on the generator's device (CPU): the same wherever they are used."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.empty(count, dtype=torch.float32, device=device).uniform_(low, high, generator=generator)


class LowRank(nn.Module):
    """up(down(x)): a projection through `rank` channels; only the second has a bias, if any."""

    def __init__(self, dim_in: int, rank: int, dim_out: int, *, bias: bool = False) -> None:
        super().__init__()
        check_counts(dim_in=dim_in, rank=rank, dim_out=dim_out)
        check_flags(bias=bias)
        self.down = nn.Linear(dim_in, rank, bias=False)
        self.up = nn.Linear(rank, dim_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class GatedHeadNorm(nn.Module):
    """RMS norm over each head's V channels, with one gain for all heads, times activation(gate).

    Args:
        value_dim: V.
        eps: added to the mean square.
        activation: of the gate; None for a norm without one. Kernels know silu and the sigmoid.
    """

    def __init__(self, value_dim: int, eps: float, activation: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        check_counts(value_dim=value_dim)
        check_activation(activation)
        self.norm = RMSNorm(value_dim, eps)
        self.activation = activation
        self.fused = next((name for name, known in ACTIVATIONS.items() if known is activation), None)

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        """o [B, T, H, V], gate [B, T, H * V] or None -> [B, T, H * V]."""
        if self._is_known(gate):
            gate = gate if self.activation is not None else None
            return gated_norm(o, gate, self.norm.weight, activation=self.fused or "silu", eps=self.norm.eps)
        assert gate is not None and self.activation is not None
        return self.norm(o).flatten(-2) * self.activation(gate)

    def projected(self, o: Tensor, gate: Tensor | None, weight: Tensor) -> Tensor:
        """forward(o, gate) weight^T, [B, T, D] by weight [D, H * V]: kept are o and the gate."""
        if not self._is_known(gate):
            return recomputed(lambda o, gate: F.linear(self(o, gate), weight), o, gate)
        gate = gate if self.activation is not None else None
        return project_gated_norm(o, gate, self.norm.weight, weight, activation=self.fused or "silu", eps=self.norm.eps)

    def _is_known(self, gate: Tensor | None) -> bool:
        """True unless the activation of a gate is one that kernels do not know."""
        return gate is None or self.activation is None or self.fused is not None
