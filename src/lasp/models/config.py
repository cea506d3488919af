"""The one configuration of a causal language model: what its parameters are and how they start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import NoneType
from typing import Any

from lasp.halo.functions import MAX_WIDTH
from lasp.kernels.select import BACKENDS
from lasp.layers.attention import GATES, NORMALIZATIONS, check_denominator
from lasp.layers.decay import DECAYS
from lasp.layers.feature_maps import FEATURE_MAPS
from lasp.layers.feedforward import FEEDFORWARDS
from lasp.layers.norms import NORMS
from lasp.softmax import METHODS as SOFTMAX_METHODS

POSITIONS = ("none", "sinusoidal", "rotary", "lrpe")
INITS = ("normal", "xavier")
MIXERS = ("linear-attention", "gla", "deltanet", "gated-deltanet", "kda", "mamba2")
# A field's annotation -> what its values are, for Python and for people.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "int | None": ((int, NoneType), "a whole number or None"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a word"),
}
# What the mixer "linear-attention" leaves open and the others settle themselves.
_OPEN = ("feature_map", "positions", "positions_in", "decay", "normalization", "gate", "scale_scores")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of `num_layers` pre-norm blocks, each a sequence mixer then a feed-forward layer.

    All fields are plain values: `dataclasses.asdict` gives JSON and `ModelConfig(**values)` takes it back.

    Attributes:
        vocab_size: number of token ids.
        d_model: width of the residual stream.
        num_layers: blocks.
        num_heads: heads of each mixer.
        key_dim, value_dim: query/key and value channels of one head; of mamba2, state dimension and head dimension.
        ffn_dim: hidden width of the feed-forward layer.
        mixer: linear-attention (which the fields from feature_map to scale_scores describe), gla, deltanet,
            gated-deltanet, kda, mamba2.
        num_key_heads: heads of queries and keys where fewer than those of values, a divisor of num_heads (delta
            rules); groups of mamba2. num_heads if None.
        conv_width: of the short convolution of delta rules and mamba2.
        negative_eigenvalues: beta of delta rules up to 2.
        layer_pattern: repeated over the layers: L is a layer of `mixer`, N one of softmax attention, as in "LLLN".
        num_kv_heads: key and value heads of softmax layers, a divisor of num_heads; num_heads if None.
        softmax_method: how keys and values of softmax layers cross ranks, "all_gather" or "ulysses".
        feature_map: of queries and keys: identity, elu+1, relu, silu, hedgehog.
        positions: "none", "sinusoidal" (added to embeddings), "rotary" or "lrpe" (on queries and keys).
        positions_in: "all" layers or the "first" only; for rotary and lrpe.
        decay: "none", "transnormer" (per head and layer) or "retnet" (per head).
        normalization: of the attention output: "head", "hidden" or "denominator".
        gate: activation of the attention's output gate: none, linear, silu, sigmoid.
        scale_scores: multiply scores by key_dim ** -0.5.
        ffn: sglu, swiglu, gelu, relu, none.
        norm: before each layer and at the end: rmsnorm, simple_rmsnorm, layernorm.
        norm_eps: added to the mean square.
        scale_embeddings: multiply embeddings by d_model ** 0.5.
        tied_embeddings: the output projection is the embedding matrix.
        init: "normal": every matrix with standard deviation `init_std`. "xavier": RetNet's, see docs/design/models.md.
        init_std: for "normal".
        backend: of lasp.linear_attention.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    key_dim: int
    value_dim: int
    ffn_dim: int
    mixer: str = "linear-attention"
    num_key_heads: int | None = None
    conv_width: int = 4
    negative_eigenvalues: bool = False
    layer_pattern: str = "L"
    num_kv_heads: int | None = None
    softmax_method: str = "all_gather"
    feature_map: str = "identity"
    positions: str = "none"
    positions_in: str = "all"
    decay: str = "none"
    normalization: str = "hidden"
    gate: str = "none"
    scale_scores: bool = True
    ffn: str = "swiglu"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    scale_embeddings: bool = False
    tied_embeddings: bool = True
    init: str = "normal"
    init_std: float = 0.02
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            check_kind(name, getattr(self, name))
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "key_dim", "value_dim", "ffn_dim"):
            value = getattr(self, name)
            least = 0 if name == "ffn_dim" and self.ffn == "none" else 1
            if value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
        for name, known in (
            ("mixer", MIXERS),
            ("feature_map", FEATURE_MAPS),
            ("positions", POSITIONS),
            ("positions_in", ("all", "first")),
            ("decay", DECAYS),
            ("normalization", NORMALIZATIONS),
            ("gate", GATES),
            ("ffn", (*FEEDFORWARDS, "none")),
            ("norm", NORMS),
            ("init", INITS),
            ("softmax_method", SOFTMAX_METHODS),
            ("backend", BACKENDS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        self._check_mixer()
        self._check_pattern()
        for name in ("norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        if not 1 <= self.conv_width <= MAX_WIDTH:
            raise ValueError(f"conv_width must be from 1 to {MAX_WIDTH}, got {self.conv_width}")
        if self.positions == "rotary" and self.key_dim % 2:
            raise ValueError(f"rotary positions need an even key_dim, got {self.key_dim}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"sinusoidal positions need an even d_model, got {self.d_model}")
        per_head = "none" if self.positions == "sinusoidal" else self.positions
        check_denominator(self.normalization, self.feature_map, per_head)

    def _check_mixer(self) -> None:
        fields = type(self).__dataclass_fields__
        if self.mixer != "linear-attention":
            changed = [name for name in _OPEN if getattr(self, name) != fields[name].default]
            if changed:
                raise ValueError(f"mixer {self.mixer!r} settles {', '.join(changed)} itself: leave them as they are")
        if self.num_key_heads is None:
            return
        if self.mixer in ("linear-attention", "gla"):
            raise ValueError(f"mixer {self.mixer!r} has as many key heads as heads: leave num_key_heads None")
        if self.num_key_heads < 1 or self.num_heads % self.num_key_heads:
            raise ValueError(f"num_key_heads must divide num_heads {self.num_heads}, got {self.num_key_heads}")

    def _check_pattern(self) -> None:
        if not self.layer_pattern or set(self.layer_pattern) - set("LN"):
            raise ValueError(
                f"layer_pattern must be of the letters L ({self.mixer}) and N (softmax attention), for example 'LLLN'; "
                f"got {self.layer_pattern!r}"
            )
        if "N" not in self.layer_pattern:
            if self.num_kv_heads is not None:
                raise ValueError(f"no softmax layer in layer_pattern {self.layer_pattern!r}: leave num_kv_heads None")
            return
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads must divide num_heads {self.num_heads}, got {self.num_kv_heads}")
        if self.softmax_rotary and self.key_dim % 2:
            raise ValueError(f"rotary positions need an even key_dim, got {self.key_dim}")

    def is_softmax(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) is one of softmax attention."""
        return self.layer_pattern[layer % len(self.layer_pattern)] == "N"

    @property
    def softmax_rotary(self) -> bool:
        """Whether softmax layers rotate queries and keys: where linear layers know positions by themselves."""
        return self.mixer != "linear-attention" or self.positions in ("rotary", "lrpe")

    def layer_positions(self, layer: int) -> str:
        """What layer `layer` (from 0) does to its queries and keys: "none", "rotary" or "lrpe"."""
        if self.positions == "sinusoidal" or (self.positions_in == "first" and layer > 0):
            return "none"
        return self.positions

    def layer_log_decay(self, layer: int) -> list[float] | None:
        """The natural-log decays of layer `layer` (from 0), one per head; None for no decay."""
        schedule = DECAYS[self.decay]
        return None if schedule is None else schedule(self.num_heads, layer, self.num_layers)


def check_kind(name: str, value: Any) -> None:
    """Raises ValueError if `value` is not of the kind that the field `name` of ModelConfig has."""
    types, expected = _KINDS[str(ModelConfig.__dataclass_fields__[name].type)]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
