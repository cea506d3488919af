"""The linear-attention layer: projections, feature maps, positions, decay, normalisation, output gate.

B = batch, T = tokens here, D = d_model, H = heads, K = key dim per head, V = value dim per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.decay import DECAYS, ConstantDecay
from lasp.layers.feature_maps import FEATURE_MAPS, NON_NEGATIVE, feature_map
from lasp.layers.fields import check_choice
from lasp.layers.mixer import LayerContext, Mixer, MixerConfig, MixerCost, MixerInputs, Operator, SavedActivations
from lasp.layers.norms import SimpleRMSNorm
from lasp.layers.positions import LRPE, Rotary
from lasp.layers.registry import family, mixer, shape
from lasp.ops import linear_attention_begin, normalized_linear_attention_begin
from lasp.ops.pending import PendingOutputs
from lasp.recurrence.inputs import state_dtype


def _identity(x: Tensor) -> Tensor:
    return x


# By name, so that models can be pickled.
GATES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "linear": _identity,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
POSITIONS = ("none", "rotary", "lrpe")
NORMALIZATIONS = ("head", "hidden", "denominator")


@mixer("linear-attention")
class LinearAttention(Mixer):
    """Causal linear attention over [B, T, D]; see `Config`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MixerConfig):
        """Linear attention with a constant decay per head, or none.

        Attributes:
            num_heads: H.
            key_dim, value_dim: K and V of one head.
            feature_map: a name in FEATURE_MAPS, applied to queries and keys.
            positions: "none", "rotary", or "lrpe" (which doubles K inside the operator).
            positions_in: "all" layers or the "first" only.
            decay: a schedule's name in DECAYS, or H natural-log decays <= 0.
            normalization: "head" or "hidden" normalises each output by its root mean square, over the head's V
                channels (RetNet) or over all H * V (TransNormerLLM); "denominator" divides it by the sum of its
                scores plus 1e-6 (Linear Transformer).
            gate: activation of the output gate, a name in GATES; "none" for no gate.
            scale_scores: multiply scores by K ** -0.5.
        """

        feature_map: str = "identity"
        positions: str = "none"
        positions_in: str = "all"
        decay: str | tuple[float, ...] = "none"
        normalization: str = "hidden"
        gate: str = "none"
        scale_scores: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            check_choice("feature_map", self.feature_map, FEATURE_MAPS)
            check_choice("positions", self.positions, POSITIONS)
            check_choice("positions_in", self.positions_in, ("all", "first"))
            check_choice("normalization", self.normalization, NORMALIZATIONS)
            check_choice("gate", self.gate, GATES)
            if isinstance(self.decay, str):
                check_choice("decay", self.decay, DECAYS)
            elif len(self.decay) != self.num_heads:
                raise ValueError(f"decay must have one value for each of {self.num_heads} heads, got {len(self.decay)}")
            if self.positions == "rotary" and self.key_dim % 2:
                raise ValueError(f"rotary positions need an even key_dim, got {self.key_dim}")
            _check_denominator(self)

        @property
        def knows_positions(self) -> bool:
            return self.positions != "none"

        def positions_of(self, layer: int) -> str:
            """Position encoding of queries and keys in layer `layer` (from 0): "none", "rotary" or "lrpe"."""
            return self.positions if self.positions_in == "all" or layer == 0 else "none"

        def log_decay(self, context: LayerContext) -> tuple[float, ...] | None:
            """The natural-log decays, one per head; None for no decay."""
            if not isinstance(self.decay, str):
                return self.decay
            schedule = DECAYS[self.decay]
            return None if schedule is None else tuple(schedule(self.num_heads, context.layer, context.num_layers))

        def cost(self, context: LayerContext) -> MixerCost:
            heads, keys, values = self.num_heads, self.num_heads * self.key_dim, self.num_heads * self.value_dim
            positions, map_kind = self.positions_of(context.layer), FEATURE_MAPS[self.feature_map]
            key_dim = self.key_dim * map_kind.widening * (2 if positions == "lrpe" else 1)
            is_gated, has_denominator = self.gate != "none", self.normalization == "denominator"
            narrow, wide = float(2 * map_kind.saved * keys + values), 0.0
            if positions == "lrpe":
                narrow += 4 * keys
            elif positions == "rotary":
                wide += self.key_dim
            if has_denominator:
                narrow, wide = narrow + 2 * heads + 2 * values, wide + heads
            else:
                wide += values + (heads if self.normalization == "head" else 1)
                narrow += {"none": 1, "linear": 3}.get(self.gate, 4) * values
            decay = "none" if self.decay == "none" else "constant"
            return MixerCost(
                Operator(self.rule, heads, heads, key_dim, self.value_dim + has_denominator, decay),
                SavedActivations(narrow, wide, 3 + is_gated),
                gates=values if is_gated else 0,
            )

    def __init__(self, config: Config, context: LayerContext) -> None:
        super().__init__(config, context)
        self.num_heads, self.key_dim, self.value_dim = config.num_heads, config.key_dim, config.value_dim
        self.normalization, self.gate = config.normalization, GATES[config.gate]
        self.scale = config.key_dim**-0.5 if config.scale_scores else 1.0
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        self.q_proj = nn.Linear(context.d_model, keys, bias=False)
        self.k_proj = nn.Linear(context.d_model, keys, bias=False)
        self.v_proj = nn.Linear(context.d_model, values, bias=False)
        self.gate_proj = nn.Linear(context.d_model, values, bias=False) if self.gate else None
        self.out_proj = nn.Linear(values, context.d_model, bias=False)
        self.q_map = feature_map(config.feature_map, self.num_heads, self.key_dim)
        self.k_map = feature_map(config.feature_map, self.num_heads, self.key_dim)
        self.positions = _positions(config.positions_of(context.layer), self.num_heads, self.q_map.dim_out)
        log_decay = config.log_decay(context)
        self.decay = None if log_decay is None else ConstantDecay(log_decay)
        normalized_dim = {"head": self.value_dim, "hidden": values}.get(self.normalization)
        self.norm = None if normalized_dim is None else SimpleRMSNorm(normalized_dim, context.norm_eps)

    def before(self, parts: tuple[Tensor, ...], start: int) -> MixerInputs:
        (x,) = parts
        k = self.k_map(self.k_proj(x).unflatten(-1, (self.num_heads, self.key_dim)))
        v = self.v_proj(x).unflatten(-1, (self.num_heads, self.value_dim))
        inputs = MixerInputs(k, v, None if self.decay is None else self.decay(state_dtype(k.dtype)))
        if self.positions is None:
            return inputs
        q, kept = self.queries(x, inputs)
        q, k = self.positions(q, k, start)
        return inputs._replace(k=k, q=q, kept=kept)

    def queries(self, x: Tensor, inputs: MixerInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        if inputs.q is not None:
            return inputs.q, inputs.kept
        gate = () if self.gate is None or self.gate_proj is None else (self.gate(self.gate_proj(x)),)
        return self.q_map(self.q_proj(x).unflatten(-1, (self.num_heads, self.key_dim))), gate

    def begin(self, inputs: MixerInputs, **sequence: Any) -> PendingOutputs:
        begin = normalized_linear_attention_begin if self.normalization == "denominator" else linear_attention_begin
        return begin(inputs.k, inputs.v, inputs.log_decay, scale=self.scale, backend=self.backend, **sequence)

    def after(self, o: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        if self.norm is not None and self.normalization == "head":
            o = self.norm(o)
        o = o.flatten(-2)
        if self.norm is not None and self.normalization == "hidden":
            o = self.norm(o)
        for gate in kept:
            o = gate * o
        return self.out_proj(o)


def _check_denominator(config: LinearAttention.Config) -> None:
    """Raise ValueError where scores could be negative, so that their sum is no denominator."""
    if config.normalization != "denominator":
        return
    if config.feature_map not in NON_NEGATIVE:
        raise ValueError(
            f"normalization 'denominator' divides by the sum of scores, which feature map {config.feature_map!r} can "
            f"make zero or negative; use one of {', '.join(sorted(NON_NEGATIVE))}, or normalization 'head' or 'hidden'"
        )
    if config.positions != "none":
        raise ValueError(
            f"normalization 'denominator' divides by the sum of scores, which {config.positions!r} positions can make "
            "zero or negative; use positions 'none' here (a model's 'sinusoidal' ones are added to the embeddings)"
        )


def _positions(name: str, num_heads: int, head_dim: int) -> Rotary | LRPE | None:
    if name == "none":
        return None
    return Rotary(head_dim) if name == "rotary" else LRPE(num_heads, head_dim)


# Published models. Where each number comes from stands in docs/design/models.md.
family(
    "linear-transformer",
    mixer="linear-attention",
    feature_map="elu+1",
    positions="sinusoidal",
    normalization="denominator",
    ffn="gelu",
    norm="layernorm",
    scale_embeddings=True,
    sizes={
        "tiny": shape(128, 4, 4, 32, 32, 512),
        "0.4b": shape(1024, 24, 8, 128, 128, 4096, vocab_size=50272),
        "1b": shape(2048, 16, 16, 128, 128, 8192, vocab_size=64000),
        "7b": shape(4096, 30, 32, 128, 128, 16384, vocab_size=64000),
    },
)
family(
    "transnormer",
    mixer="linear-attention",
    feature_map="silu",
    positions="lrpe",
    positions_in="first",
    decay="transnormer",
    normalization="hidden",
    gate="linear",
    scale_scores=False,
    ffn="sglu",
    norm="simple_rmsnorm",
    norm_eps=1e-8,
    scale_embeddings=True,
    sizes={
        "tiny": shape(128, 4, 4, 32, 32, 352),
        "0.4b": shape(1024, 24, 8, 128, 128, 2816, vocab_size=50272),
        "1b": shape(2048, 16, 16, 128, 128, 5632, vocab_size=64000),
        "7b": shape(4096, 30, 32, 128, 128, 11008, vocab_size=64000),
    },
)
family(
    "retnet",
    mixer="linear-attention",
    positions="rotary",
    decay="retnet",
    normalization="head",
    gate="silu",
    ffn="gelu",
    norm="rmsnorm",
    scale_embeddings=True,
    init="xavier",
    sizes={
        "tiny": shape(128, 4, 4, 32, 64, 256),
        "0.4b": shape(1024, 24, 4, 256, 512, 2048, vocab_size=50272),
        "1b": shape(2048, 24, 8, 256, 512, 4096, vocab_size=64000),
        "7b": shape(4096, 32, 16, 256, 512, 8192, vocab_size=64000),
    },
)
