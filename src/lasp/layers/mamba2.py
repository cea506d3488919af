"""Mamba-2's layer: the state-space dual (SSD) as linear attention with a gate per head.

The recurrence h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t^T, y_t = C_t h_t + D x_t (Dao & Gu, arXiv 2405.21060) is
linear attention with queries C, keys B, values x, weights dt, log-decays A dt and the skip D.

H = heads, P = channels of one head, G = groups of heads that share B and C, N = state dimension. As a mixer's key_dim
is N, its value_dim P and its num_key_heads G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lasp.layers.fields import check_divisor
from lasp.layers.fused import project_norm_of_gated
from lasp.layers.gates import SteppedDecay
from lasp.layers.mixer import LayerContext, Mixer, MixerConfig, MixerCost, MixerInputs, Operator, SavedActivations
from lasp.layers.projection import project_in_parts
from lasp.layers.registry import family, mixer, shape
from lasp.layers.short_convolution import ShortConvolution, check_width
from lasp.ops import linear_attention_begin
from lasp.ops.pending import PendingOutputs


@mixer("mamba2")
class Mamba2(Mixer):
    """Causal SSD over [B, T, D]; see `Config`."""

    recomputes = True

    @dataclass(frozen=True, kw_only=True)
    class Config(MixerConfig):
        """Mamba-2.

        Attributes:
            num_heads: H.
            key_dim: N.
            value_dim: P; the inner width is H * P, usually 2 D.
            num_key_heads: G, a divisor of H; H if None.
            conv_width: of the short convolution over x, B and C.
        """

        num_key_heads: int | None = None
        conv_width: int = 4

        def __post_init__(self) -> None:
            super().__post_init__()
            check_divisor("num_key_heads", self.num_key_heads, "num_heads", self.num_heads)
            check_width(self.conv_width)

        @property
        def groups(self) -> int:
            return self.num_key_heads or self.num_heads

        @property
        def convolved(self) -> int:
            """Channels of the convolution: x, B and C."""
            return self.num_heads * self.value_dim + 2 * self.groups * self.key_dim

        def cost(self, context: LayerContext) -> MixerCost:
            heads, values = self.num_heads, self.num_heads * self.value_dim
            queries = 2 * heads * self.key_dim  # spread over the heads of their groups
            projected = values + self.convolved + heads
            narrow = 3 * self.convolved + queries + projected + 2 * values
            return MixerCost(
                Operator(self.rule, heads, self.groups, self.key_dim, self.value_dim, "head"),
                SavedActivations(narrow, 3 * heads, 1),
                gates=values + heads,
                convolved=self.convolved,
                conv_width=self.conv_width,
            )

    def __init__(self, config: Config, context: LayerContext) -> None:
        super().__init__(config, context)
        self.num_heads, self.head_dim = config.num_heads, config.value_dim
        self.num_groups, self.state_dim = config.groups, config.key_dim
        inner = self.num_heads * self.head_dim
        self.widths = [inner, config.convolved + self.num_heads]
        self.in_proj = nn.Linear(context.d_model, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(config.convolved, config.conv_width, bias=True)
        self.parts_of_convolution = (inner, *(self.num_groups * self.state_dim,) * 2)
        self.passing = self.num_heads  # its steps
        self.decay = SteppedDecay(self.num_heads)
        self.skip = nn.Parameter(torch.ones(self.num_heads))
        self.norm_eps = context.norm_eps
        self.gain = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, context.d_model, bias=False)

    def reset_parameters(self) -> None:
        """Reset the parameters of the layer itself; its modules reset their own."""
        nn.init.ones_(self.skip)
        nn.init.ones_(self.gain)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        z, mixed = project_in_parts(x, self.in_proj, self.widths)
        return mixed, z

    def before(self, parts: tuple[Tensor, ...], start: int) -> MixerInputs:
        values, keys, queries, dt, z = parts
        values = values.unflatten(-1, (self.num_heads, self.head_dim))
        keys, queries = (t.unflatten(-1, (self.num_groups, self.state_dim)) for t in (keys, queries))
        log_step, log_decay = self.decay.logarithms(dt)
        return MixerInputs(keys, values, log_decay, q=queries, log_weight=log_step, kept=(z,))

    def begin(self, inputs: MixerInputs, **sequence: Any) -> PendingOutputs:
        ways = {"log_weight": inputs.log_weight, "skip": self.skip, "scale": 1.0, "backend": self.backend}
        return linear_attention_begin(inputs.k, inputs.v, inputs.log_decay, **ways, **sequence)  # type: ignore[arg-type]

    def after(self, o: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        (z,) = kept
        weights = (self.gain, self.out_proj.weight)
        return project_norm_of_gated(o, z, *weights, groups=self.num_groups, eps=self.norm_eps)


# The authors' models of 370M and 1.3B parameters: docs/design/models.md.
family(
    "mamba2",
    mixer="mamba2",
    num_key_heads=1,
    ffn="none",
    norm_eps=1e-5,
    sizes={
        "tiny": shape(128, 8, 8, 32, 32, 0),
        "0.4b": shape(1024, 48, 32, 128, 64, 0, vocab_size=50288),
        "1b": shape(2048, 48, 64, 128, 64, 0, vocab_size=50288),
    },
)
