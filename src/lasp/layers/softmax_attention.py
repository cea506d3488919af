"""The softmax-attention layer of hybrid models.

B = batch, T = tokens here, D = d_model, H = query heads, H_kv = key and value heads, K, V = their channels.
Its state is not a recurrence's: it is the keys and values of all tokens so far, and grows with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lasp.layers.fields import check_choice, check_divisor
from lasp.layers.mixer import LayerContext, Mixer, MixerConfig, MixerCost, MixerInputs, Operator, SavedActivations
from lasp.layers.positions import Rotary
from lasp.layers.registry import family, mixer, shape
from lasp.ops.pending import PendingOutputs
from lasp.softmax import METHODS, softmax_attention
from lasp.softmax.within import has_operators


@mixer("softmax")
class SoftmaxAttention(Mixer):
    """Causal softmax attention over [B, T, D]; see `Config`.

    Its state is [B, tokens, H_kv, K + V] of x's dtype, rotated keys beside values.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(MixerConfig):
        """Softmax attention.

        Attributes:
            num_heads: H.
            key_dim, value_dim: K and V of one head.
            num_kv_heads: H_kv, a divisor of H; H if None.
            rotary: rotate queries and keys by their global positions.
            softmax_method: how keys and values cross ranks; see `method` of `lasp.softmax_attention`.
        """

        num_kv_heads: int | None = None
        rotary: bool = True
        softmax_method: str = "auto"

        rule: ClassVar[str] = "softmax"

        def __post_init__(self) -> None:
            super().__post_init__()
            check_divisor("num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads)
            check_choice("softmax_method", self.softmax_method, METHODS)
            if self.rotary and self.key_dim % 2:
                raise ValueError(f"rotary positions need an even key_dim, got {self.key_dim}")

        @property
        def knows_positions(self) -> bool:
            return self.rotary

        def cost(self, context: LayerContext) -> MixerCost:
            heads, key_heads = self.num_heads, self.num_kv_heads or self.num_heads
            narrow = heads * self.key_dim + key_heads * (self.key_dim + self.value_dim) + 2 * heads * self.value_dim
            return MixerCost(
                Operator(self.rule, heads, key_heads, self.key_dim, self.value_dim),
                SavedActivations(narrow, self.rotary * self.key_dim + heads, 3),
            )

    def __init__(self, config: Config, context: LayerContext) -> None:
        super().__init__(config, context)
        self.method = config.softmax_method
        # Other names are backends of recurrences only.
        self.backend = "reference" if context.backend == "reference" else "auto"
        key_heads = config.num_kv_heads or config.num_heads
        self.heads = (config.num_heads, config.key_dim)
        self.keys, self.values = (key_heads, config.key_dim), (key_heads, config.value_dim)
        self.q_proj = nn.Linear(context.d_model, math.prod(self.heads), bias=False)
        self.k_proj = nn.Linear(context.d_model, math.prod(self.keys), bias=False)
        self.v_proj = nn.Linear(context.d_model, math.prod(self.values), bias=False)
        self.out_proj = nn.Linear(config.num_heads * config.value_dim, context.d_model, bias=False)
        self.positions = Rotary(config.key_dim) if config.rotary else None

    def has_operators(self, device: torch.device, dtype: torch.dtype) -> bool:
        width = max(self.config.key_dim, self.config.value_dim)
        return self.backend == "auto" and has_operators(device, dtype, width)

    def before(self, parts: tuple[Tensor, ...], start: int) -> MixerInputs:
        (x,) = parts
        q = self.q_proj(x).unflatten(-1, self.heads)
        k = self.k_proj(x).unflatten(-1, self.keys)
        v = self.v_proj(x).unflatten(-1, self.values)
        if self.positions is not None:
            q, k = self.positions(q, k, start)
        return MixerInputs(k, v, q=q)

    def begin(self, inputs: MixerInputs, **sequence: Any) -> PendingOutputs:
        # Its keys and values start on their way with the queries.
        attend = partial(softmax_attention, k=inputs.k, v=inputs.v, method=self.method, backend=self.backend)
        return PendingOutputs(partial(attend, **sequence))

    def after(self, o: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        return self.out_proj(o.flatten(-2))


# Three linear layers with RetNet's decays and norms, then a softmax layer, as LASP-2's models: docs/design/models.md.
family(
    "hybrid",
    mixer="linear-attention",
    layer_pattern="LLLN",
    positions="rotary",
    decay="retnet",
    normalization="head",
    gate="silu",
    norm_eps=1e-5,
    sizes={
        "tiny": shape(128, 4, 4, 32, 32, 352, num_kv_heads=1),
        "1b": shape(2048, 16, 32, 64, 64, 8192, vocab_size=128256, num_kv_heads=8),
    },
)
