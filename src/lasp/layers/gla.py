"""Gated linear attention: a decay per key channel, learned from the input (Yang et al., arXiv 2312.06635)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.fields import check_counts
from lasp.layers.gates import GatedHeadNorm, LowRank
from lasp.layers.mixer import LayerContext, Mixer, MixerConfig, MixerCost, MixerInputs, Operator, SavedActivations
from lasp.layers.registry import family, mixer, shape
from lasp.ops import linear_attention_begin
from lasp.ops.pending import PendingOutputs
from lasp.recurrence.inputs import state_dtype

# The paper's temperature: decays are the 16th root of a sigmoid, so that they start slow.
GATE_TEMPERATURE = 16.0


@mixer("gla")
class GatedLinearAttention(Mixer):
    """Causal GLA over [B, T, D], with a silu output gate; see `Config`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MixerConfig):
        """GLA.

        Attributes:
            num_heads: H.
            key_dim, value_dim: K and V of one head; as published H * K = D / 2 and H * V = D.
            decay_rank: rank of the decays' projection.
        """

        decay_rank: int = 16

        def __post_init__(self) -> None:
            super().__post_init__()
            check_counts(decay_rank=self.decay_rank)

        def cost(self, context: LayerContext) -> MixerCost:
            heads, keys, values = self.num_heads, self.num_heads * self.key_dim, self.num_heads * self.value_dim
            return MixerCost(
                Operator(self.rule, heads, heads, self.key_dim, self.value_dim, "channel"),
                SavedActivations(2 * keys + 3 * values + self.decay_rank, 3 * keys, 5),
                gates=values + keys,
            )

    def __init__(self, config: Config, context: LayerContext) -> None:
        super().__init__(config, context)
        self.keys, self.values = (config.num_heads, config.key_dim), (config.num_heads, config.value_dim)
        d_model, keys, values = context.d_model, math.prod(self.keys), math.prod(self.values)
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.decay_proj = LowRank(d_model, config.decay_rank, keys, bias=True)
        self.gate_proj = nn.Linear(d_model, values, bias=False)
        self.norm = GatedHeadNorm(config.value_dim, context.norm_eps, F.silu)
        self.out_proj = nn.Linear(values, d_model, bias=False)

    def before(self, parts: tuple[Tensor, ...], start: int) -> MixerInputs:
        (x,) = parts
        decay = self.decay_proj(x)
        return MixerInputs(
            self.k_proj(x).unflatten(-1, self.keys),
            self.v_proj(x).unflatten(-1, self.values),
            F.logsigmoid(decay.to(state_dtype(decay.dtype))).unflatten(-1, self.keys) / GATE_TEMPERATURE,
        )

    def queries(self, x: Tensor, inputs: MixerInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        gate = self.gate_proj(x)
        return self.q_proj(x).unflatten(-1, self.keys), (gate,)

    def begin(self, inputs: MixerInputs, **sequence: Any) -> PendingOutputs:
        return linear_attention_begin(inputs.k, inputs.v, inputs.log_decay, backend=self.backend, **sequence)

    def after(self, o: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        return self.norm.projected(o, kept[0] if kept else None, self.out_proj.weight)


# The models of 340M and 1.3B parameters that the authors trained: docs/design/models.md.
family(
    "gla",
    mixer="gla",
    norm_eps=1e-5,
    tied_embeddings=False,
    sizes={
        "tiny": shape(128, 4, 4, 16, 32, 352),
        "0.4b": shape(1024, 24, 4, 128, 256, 2816, vocab_size=32000),
        "1b": shape(2048, 24, 4, 256, 512, 5632, vocab_size=32000),
    },
)
