"""The delta rule's layers: DeltaNet, Gated DeltaNet, Kimi Delta Attention. They differ in their gates.

| | decay | output gate | beta |
|---|---|---|---|
| DeltaNet (arXiv 2406.06484) | none | none | sigmoid |
| Gated DeltaNet (arXiv 2412.06464) | per head | silu | sigmoid |
| KDA (arXiv 2510.26692) | per key channel, through a low rank | sigmoid, through a low rank | sigmoid |

All have a short convolution with SiLU over queries, keys and values, keys and queries of length 1, and an RMS norm
per head. Twice the sigmoid gives beta in (0, 2) and the state negative eigenvalues (arXiv 2411.12537).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.fields import check_choice, check_divisor
from lasp.layers.gates import GatedHeadNorm, LowRank, SteppedDecay
from lasp.layers.mixer import LayerContext, Mixer, MixerConfig, MixerCost, MixerInputs, Operator, SavedActivations
from lasp.layers.projection import project_together
from lasp.layers.registry import family, mixer, shape
from lasp.layers.short_convolution import ShortConvolution, check_width
from lasp.ops import delta_rule_begin
from lasp.ops.pending import PendingOutputs
from lasp.sequence.arguments import whole

DECAYS = ("none", "head", "channel")
OUTPUT_GATES = {"none": None, "silu": F.silu, "sigmoid": torch.sigmoid}


@mixer("kda", learned_decay="channel", output_gate="sigmoid", gate_rank=None)
@mixer("gated-deltanet", learned_decay="head", output_gate="silu")
@mixer("deltanet")
class DeltaNet(Mixer):
    """Causal delta-rule attention over [B, T, D]; see `Config`."""

    recomputes = True

    @dataclass(frozen=True, kw_only=True)
    class Config(MixerConfig):
        """The delta rule with its gates.

        Attributes:
            num_heads: H_v, heads of values, betas and decays.
            key_dim, value_dim: K and V of one head.
            num_key_heads: H, heads of queries and keys, a divisor of H_v; H_v if None.
            learned_decay: "none" (DeltaNet), "head" (Gated DeltaNet) or "channel" (KDA, whose projection has rank V).
            output_gate: "none", "silu" or "sigmoid".
            gate_rank: rank of the output gate's projection, which then has a bias: V if None; 0 for full rank.
            negative_eigenvalues: beta up to 2 instead of 1.
            conv_width: of the short convolution.
        """

        num_key_heads: int | None = None
        learned_decay: str = "none"
        output_gate: str = "none"
        gate_rank: int | None = 0
        negative_eigenvalues: bool = False
        conv_width: int = 4

        rule: ClassVar[str] = "delta"

        def __post_init__(self) -> None:
            super().__post_init__()
            check_divisor("num_key_heads", self.num_key_heads, "num_heads", self.num_heads)
            check_choice("learned_decay", self.learned_decay, DECAYS)
            check_choice("output_gate", self.output_gate, OUTPUT_GATES)
            check_width(self.conv_width)
            if self.gate_rank is not None:
                whole("gate_rank", self.gate_rank, 0)

        @property
        def key_heads(self) -> int:
            return self.num_key_heads or self.num_heads

        @property
        def convolved(self) -> int:
            """Channels of the convolution: queries, keys and values."""
            return 2 * self.key_heads * self.key_dim + self.num_heads * self.value_dim

        @property
        def rank(self) -> int:
            return self.value_dim if self.gate_rank is None else self.gate_rank

        def cost(self, context: LayerContext) -> MixerCost:
            heads, values = self.num_heads, self.num_heads * self.value_dim
            decays = {"none": 0, "head": heads, "channel": heads * self.key_dim}[self.learned_decay]
            is_gated = self.output_gate != "none"
            # Normalised queries and keys in fp32.
            normalized = 2 * self.key_heads * (self.key_dim + 1)
            narrow = 3 * self.convolved + heads + values
            narrow += is_gated * (self.rank + values)
            narrow += self.value_dim * (self.learned_decay == "channel")
            return MixerCost(
                Operator(self.rule, heads, self.key_heads, self.key_dim, self.value_dim, self.learned_decay),
                SavedActivations(narrow, normalized + heads + 3 * decays, 4 + (decays > 0) + is_gated),
                gates=heads + decays + is_gated * values,
                convolved=self.convolved,
                conv_width=self.conv_width,
            )

    def __init__(self, config: Config, context: LayerContext) -> None:
        super().__init__(config, context)
        self.key_heads = config.key_heads
        self.keys, self.values = (config.key_heads, config.key_dim), (config.num_heads, config.value_dim)
        self.max_beta = 2.0 if config.negative_eigenvalues else 1.0
        d_model, keys, values = context.d_model, math.prod(self.keys), math.prod(self.values)
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        # One convolution over the three, so that one message carries what it needs across ranks.
        self.convolution = ShortConvolution(config.convolved, config.conv_width)
        self.parts_of_convolution = (keys, keys, values)
        self.beta_proj = nn.Linear(d_model, config.num_heads, bias=False)
        self.decay_proj: nn.Module | None = None
        self.decay: SteppedDecay | None = None
        if config.learned_decay == "head":
            self.decay_proj = nn.Linear(d_model, config.num_heads, bias=False)
            self.decay = SteppedDecay(config.num_heads)
        elif config.learned_decay == "channel":
            self.decay_proj = LowRank(d_model, config.value_dim, config.num_heads * config.key_dim)
            self.decay = SteppedDecay(config.num_heads, config.key_dim)
        self.gate_proj: nn.Module | None = None
        if config.output_gate != "none":
            is_full = config.rank == 0
            self.gate_proj = (
                nn.Linear(d_model, values, bias=False) if is_full else LowRank(d_model, config.rank, values, bias=True)
            )
        self.norm = GatedHeadNorm(config.value_dim, context.norm_eps, OUTPUT_GATES[config.output_gate])
        self.out_proj = nn.Linear(values, d_model, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return project_together(x, self.q_proj, self.k_proj, self.v_proj), x

    def before(self, parts: tuple[Tensor, ...], start: int) -> MixerInputs:
        q, k, v, x = parts
        log_decay = None
        if self.decay is not None and self.decay_proj is not None:
            _, log_decay = self.decay(self.decay_proj(x))
        return MixerInputs(
            k.unflatten(-1, self.keys),
            v.unflatten(-1, self.values),
            log_decay,
            beta=self.max_beta * self.beta_proj(x).sigmoid(),
            q=q.unflatten(-1, self.keys),
        )

    def queries(self, x: Tensor, inputs: MixerInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert inputs.q is not None
        return inputs.q, () if self.gate_proj is None else (self.gate_proj(x),)

    def begin(self, inputs: MixerInputs, **sequence: Any) -> PendingOutputs:
        assert inputs.beta is not None
        return delta_rule_begin(
            inputs.k, inputs.v, inputs.beta, inputs.log_decay, normalize_qk=True, backend=self.backend, **sequence
        )

    def after(self, o: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        return self.norm.projected(o, kept[0] if kept else None, self.out_proj.weight)


# Published models. Where each number comes from stands in docs/design/models.md.
family(
    "deltanet",
    mixer="deltanet",
    norm_eps=1e-5,
    tied_embeddings=False,
    sizes={
        "tiny": shape(128, 4, 4, 32, 32, 352),
        "1b": shape(2048, 24, 16, 128, 128, 5632, vocab_size=32000),
    },
)
family(
    "gated-deltanet",
    mixer="gated-deltanet",
    norm_eps=1e-5,
    tied_embeddings=False,
    sizes={
        "tiny": shape(128, 4, 3, 32, 64, 256),
        "1b": shape(2048, 21, 6, 256, 512, 5632, vocab_size=32000),
    },
)
family(
    "kda",
    mixer="kda",
    norm_eps=1e-5,
    tied_embeddings=False,
    sizes={
        "tiny": shape(128, 4, 4, 32, 32, 320),
        "1b": shape(2048, 24, 16, 128, 128, 5632, vocab_size=32000, layer_pattern="LLLN", num_kv_heads=4, rotary=False),
    },
)
