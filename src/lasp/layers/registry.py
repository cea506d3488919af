"""Mixers and published models by name. A file of lasp.layers registers what it holds; all else asks here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from lasp.layers.mixer import Mixer, MixerConfig


class MixerKind(NamedTuple):
    """A name for a mixer: its configuration, and the fields that the name settles."""

    config: type[MixerConfig]
    settled: Mapping[str, Any]


class Family(NamedTuple):
    """A published model at several sizes. Settings are fields of ModelConfig and of its mixer, by name."""

    settings: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Any]]


MIXERS: dict[str, MixerKind] = {}
FAMILIES: dict[str, Family] = {}

M = TypeVar("M", bound=type[Mixer])


def mixer(name: str, **settled: Any) -> Callable[[M], M]:
    """Decorate a mixer to register it as `name`, the configuration nested in it as `Config`.

    settled: fields of the configuration that the name stands for, where one layer has several names. The name without
    any comes first: by it the configuration is stored.
    """

    def register(layer: M) -> M:
        config: type[MixerConfig] = layer.Config  # type: ignore[attr-defined]
        if not settled:
            config.kind, config.layer = name, layer
        if name in MIXERS:
            raise ValueError(f"mixer {name!r} is registered twice")
        MIXERS[name] = MixerKind(config, MappingProxyType(settled))
        return layer

    return register


def family(name: str, *, sizes: Mapping[str, Mapping[str, Any]], **settings: Any) -> None:
    """Register a model by name. sizes: for each, `shape(...)`; settings: what makes the model, at any size."""
    if name in FAMILIES:
        raise ValueError(f"model {name!r} is registered twice")
    FAMILIES[name] = Family(MappingProxyType(settings), MappingProxyType(dict(sizes)))


def shape(
    d_model: int, num_layers: int, num_heads: int, key_dim: int, value_dim: int, ffn_dim: int, **more: Any
) -> dict[str, Any]:
    """The settings of one size; more: others, such as `vocab_size`."""
    return {
        "d_model": d_model, "num_layers": num_layers, "num_heads": num_heads, "key_dim": key_dim,
        "value_dim": value_dim, "ffn_dim": ffn_dim, **more,
    }  # fmt: skip
