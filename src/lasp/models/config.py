"""The one configuration of a causal language model: what its parameters are and how they start."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lasp.kernels.select import BACKENDS
from lasp.layers import FEEDFORWARDS, MIXERS, NORMS, LayerContext, Mixer, MixerConfig
from lasp.layers.fields import check_choice, check_fields, check_kind, kind_of

POSITIONS = ("none", "sinusoidal")
INITS = ("normal", "xavier")
# Settings that no mixer need have: they did nothing where the mixer has no such field, and still do.
_IDLE = ("conv_width", "negative_eigenvalues", "softmax_method")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of `num_layers` pre-norm blocks, each a sequence mixer then a feed-forward layer.

    All fields are plain values but the mixer: `to_dict` gives JSON and `from_dict` takes it back.

    Attributes:
        vocab_size: number of token ids.
        d_model: width of the residual stream.
        num_layers: blocks.
        ffn_dim: hidden width of the feed-forward layer.
        mixer: of every layer, or a pattern of them that is repeated over the layers.
        positions: "none", or "sinusoidal" ones added to embeddings. Others are the mixer's.
        ffn: sglu, swiglu, gelu, relu, none.
        norm: before each layer and at the end: rmsnorm, simple_rmsnorm, layernorm.
        norm_eps: added to the mean square, in mixers too.
        scale_embeddings: multiply embeddings by d_model ** 0.5.
        tied_embeddings: the output projection is the embedding matrix.
        init: "normal": every matrix with standard deviation `init_std`. "xavier": RetNet's, see docs/design/models.md.
        init_std: for "normal".
        backend: of lasp.linear_attention.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    ffn_dim: int
    mixer: MixerConfig | tuple[MixerConfig, ...]
    positions: str = "none"
    ffn: str = "swiglu"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    scale_embeddings: bool = False
    tied_embeddings: bool = True
    init: str = "normal"
    init_std: float = 0.02
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        pattern = self.mixer if isinstance(self.mixer, (tuple, list)) and len(self.mixer) > 0 else (self.mixer,)
        if not all(isinstance(each, MixerConfig) for each in pattern):
            raise ValueError(f"mixer must be a configuration of one of {', '.join(MIXERS)}, or several of them")
        for name in ("vocab_size", "d_model", "num_layers", "ffn_dim"):
            value = getattr(self, name)
            least = 0 if name == "ffn_dim" and self.ffn == "none" else 1
            if value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
        check_choice("positions", self.positions, POSITIONS)
        check_choice("ffn", self.ffn, (*FEEDFORWARDS, "none"))
        check_choice("norm", self.norm, NORMS)
        check_choice("init", self.init, INITS)
        check_choice("backend", self.backend, BACKENDS)
        for name in ("norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"sinusoidal positions need an even d_model, got {self.d_model}")

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """The pattern that is repeated over the layers."""
        return (self.mixer,) if isinstance(self.mixer, MixerConfig) else tuple(self.mixer)

    def mixer_of(self, layer: int) -> MixerConfig:
        """The mixer of layer `layer` (from 0)."""
        return self.mixers[layer % len(self.mixers)]

    def context(self, layer: int) -> LayerContext:
        """Settings of the model that layer `layer` (from 0) depends on."""
        return LayerContext(self.d_model, layer, self.num_layers, self.norm_eps, self.backend)

    def build_mixer(self, layer: int) -> Mixer:
        """A new mixer for layer `layer` (from 0): x [B, T, D] -> y [B, T, D] and its state."""
        return self.mixer_of(layer).build(self.context(layer))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        mixers = [each.to_dict() for each in self.mixers]
        return {**values, "mixer": mixers[0] if isinstance(self.mixer, MixerConfig) else mixers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration that `to_dict` gave, or that an earlier version wrote, as settings.

        Raises:
            ValueError, TypeError, KeyError: it is none.
        """
        mixer = values["mixer"]
        if isinstance(mixer, str):
            # Written whether asked for or not.
            by_default = {"softmax_method": "all_gather"}.items()
            return from_settings({name: value for name, value in values.items() if (name, value) not in by_default})
        return cls(**{**values, "mixer": _read(mixer) if isinstance(mixer, Mapping) else tuple(map(_read, mixer))})


def current_form(values: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration as `to_dict` writes it today; anything that is none as it is."""
    return ModelConfig.from_dict(values).to_dict() if isinstance(values.get("mixer"), str) else values


def setting_names() -> list[str]:
    """The names that `from_settings` takes."""
    return list(dict.fromkeys([*_fields(ModelConfig), "layer_pattern", *_mixer_fields()]))


def setting_kind(name: str) -> str:
    """The annotation of the field that a setting sets."""
    field = _field(name)
    return "str" if field is None else kind_of(field)


def from_settings(settings: Mapping[str, Any]) -> ModelConfig:
    """A configuration from fields of ModelConfig and of its mixers, all by name.

    A field of several mixers is set in each that has it. Besides there are
        mixer: a name in MIXERS; linear-attention by default.
        layer_pattern: repeated over the layers: L is a layer of `mixer`, N one of softmax attention, as in "LLLN".
        positions: "sinusoidal" is the model's, others the mixer's.

    Raises:
        ValueError: no mapping of names, an unknown name, a value that its field refuses, or a field that the mixers do
            not have.
    """
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f"settings must be a mapping of names to values, got {settings!r}")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    if unknown := sorted(given.keys() - set(setting_names())):
        raise ValueError(f"ModelConfig has no field {', '.join(unknown)}; it has {', '.join(setting_names())}")
    for name, value in given.items():
        if (field := _field(name)) is not None:
            check_kind(field, value)
    kind, pattern = given.pop("mixer", "linear-attention"), given.pop("layer_pattern", "L")
    check_choice("mixer", kind, MIXERS)
    if not isinstance(pattern, str) or not pattern or set(pattern) - set("LN"):
        raise ValueError(
            f"layer_pattern must be of the letters L ({kind}) and N (softmax attention), for example 'LLLN'; "
            f"got {pattern!r}"
        )
    own = {name: given.pop(name) for name in _fields(ModelConfig) if name in given and name != "positions"}
    if given.get("positions") == "sinusoidal":
        own["positions"] = given.pop("positions")
    mixers = {"L": _of_kind(kind, given)}
    if "N" in pattern:
        mixers["N"] = _of_kind("softmax", {"rotary": mixers["L"].knows_positions, **given})
    _check_used(given, kind, pattern, set[str]().union(*(_fields(type(each)) for each in mixers.values())))
    one = mixers[pattern[0]]
    return ModelConfig(**own, mixer=one if len(set(pattern)) == 1 else tuple(mixers[each] for each in pattern))


def _fields(config: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(config)}


def _mixer_fields() -> dict[str, dataclasses.Field[Any]]:
    """Fields of all mixers; those of one name are of one kind."""
    return {name: field for each in MIXERS.values() for name, field in _fields(each.config).items()}


def _field(name: str) -> dataclasses.Field[Any] | None:
    """The field that a setting sets; None of `mixer` and `layer_pattern`."""
    return None if name == "mixer" else (_fields(ModelConfig) | _mixer_fields()).get(name)


def _of_kind(kind: str, given: Mapping[str, Any]) -> MixerConfig:
    """The mixer of that name, of what is given the fields that it has."""
    config, settled = MIXERS[kind]
    return config(**{**settled, **{name: given[name] for name in _fields(config) if name in given}})


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _read(values: Mapping[str, Any]) -> MixerConfig:
    """The mixer that `MixerConfig.to_dict` gave."""
    fields = _tuples(values)
    kind = fields.pop("kind")
    check_choice("mixer", kind, MIXERS)
    return MIXERS[kind].config(**fields)


def _check_used(given: Mapping[str, Any], kind: str, pattern: str, used: set[str]) -> None:
    """Raise ValueError for a field of other mixers that is given and is not as it is by default."""
    for name in given.keys() - used - set(_IDLE):
        default = _mixer_fields()[name].default
        if given[name] == default:
            continue
        if name in _fields(MIXERS["softmax"].config):
            raise ValueError(f"no softmax layer in layer_pattern {pattern!r}: leave {name} {default}")
        raise ValueError(f"mixer {kind!r} settles {name} itself: leave {name} {default}")
