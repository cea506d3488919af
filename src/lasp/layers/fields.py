"""Checks of a configuration's fields: ValueError, which names the field, what it was and what it must be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from lasp.sequence.arguments import whole

# A field's annotation -> what its values are, for Python and for people.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "int | None": ((int, NoneType), "a whole number or None"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a word"),
    "str | tuple[float, ...]": ((str, tuple), "a word, or one number for each head"),
}


def check_fields(config: Any) -> None:
    """Raise ValueError for a field of a configuration whose value is not of its kind."""
    for field in dataclasses.fields(config):
        check_kind(field, getattr(config, field.name))


def check_kind(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise ValueError if `value` is not of the kind that the field has; kinds not listed here check themselves."""
    types, expected = _KINDS.get(kind_of(field), ((object,), ""))
    if not isinstance(value, types) or (isinstance(value, bool) and not {bool, object} & set(types)):
        raise ValueError(f"{field.name} must be {expected}, got {value!r}")


def kind_of(field: dataclasses.Field[Any]) -> str:
    """The field's annotation as it is written."""
    return field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))


def check_choice(name: str, value: object, known: Sequence[str] | Mapping[str, Any]) -> None:
    """Raise ValueError for a name that is not known."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def check_counts(**counts: Any) -> None:
    """Raise ValueError unless each is a whole number >= 1."""
    for name, value in counts.items():
        whole(name, value, 1)


def check_activation(activation: object) -> None:
    """Raise ValueError for what is neither a function nor None."""
    if activation is not None and not callable(activation):
        raise ValueError(f"activation must be a function of a tensor, or None, got {activation!r}")


def check_divisor(name: str, value: int | None, total_name: str, total: int) -> None:
    """Raise ValueError unless `value` is None or divides `total`."""
    if value is not None and (value < 1 or total % value):
        raise ValueError(f"{name} must divide {total_name} {total}, got {value}")
