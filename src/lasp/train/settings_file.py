"""Settings as plain values: from a TOML file, from JSON that a run or a checkpoint keeps, and back."""

import dataclasses
import typing
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar

from lasp import files
from lasp.errors import ConfigError
from lasp.train.config import TrainConfig
from lasp.train.sizes import Tokens, tokens

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """A JSON-able dictionary of a config dataclass."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(cls: type[C], values: dict[str, Any], *, where: str = "") -> C:
    """The config dataclass `cls` from a dictionary as TOML or JSON give it; missing keys take their defaults.

    Raises ConfigError naming the key for unknown keys and wrong types.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [item.name for item in dataclasses.fields(typing.cast(Any, cls))]
    unknown = sorted(set(values) - set(known))
    if unknown:
        place = f" in [{where}]" if where else ""
        raise ConfigError(f"unknown setting {unknown[0]!r}{place}; known: {', '.join(known)}")
    converted = {key: _convert(hints[key], value, f"{where}.{key}" if where else key) for key, value in values.items()}
    return cls(**converted)


def load_toml(path: Path) -> TrainConfig:
    """The TrainConfig in a TOML file. Raises ConfigError if it cannot be read."""
    values = read_toml(path, "config file")
    try:
        return from_dict(TrainConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The values in a TOML file, which is the `what` of the user's. Raises ConfigError if it cannot be read."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        return tomllib.loads(files.read(path, follow=True).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the {what} {path}: {error}") from error


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line `key: old -> new` for every leaf in which two dictionaries differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def _convert(hint: Any, value: Any, name: str) -> Any:
    if hint == Tokens and isinstance(value, str):
        return tokens(value, name)
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type[Any], hint), value, where=name)
    if origin is Literal and value in arguments:
        return value
    if origin in (UnionType, typing.Union):
        if value is None or type(value) in arguments:
            return value
        return _convert(next(item for item in arguments if item is not type(None)), value, name)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(arguments[0], item, name) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if origin is Literal:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    raise ConfigError(f"{name} must be {getattr(hint, '__name__', hint)}, got {value!r}")
