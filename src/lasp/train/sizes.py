"""Numbers of tokens as people write them, for every option and setting that takes one."""

from typing import Annotated

import tyro

from lasp.errors import ConfigError

_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_LARGEST = 1 << 40


def tokens(text: str, name: str) -> int:
    """A number of tokens such as 4096, 64K or 1M. Raises ConfigError naming the setting `name`."""
    digits, unit = text.strip(), 1
    if digits and digits[-1].lower() in _UNITS:
        digits, unit = digits[:-1], _UNITS[digits[-1].lower()]
    if not digits.isdecimal() or not 0 < int(digits) * unit <= _LARGEST:
        raise ConfigError(f"{name} must be a number of tokens from 1 to 1024G, such as 4096, 64K or 1M; got {text!r}")
    return int(digits) * unit


def _option(text: str) -> int:
    # Whole numbers that are no size are left for the check of all settings, which names their option.
    return int(text) if text.strip().lstrip("-").isdecimal() else tokens(text, "it")


Tokens = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|64K|1M",
        instance_from_str=lambda words: _option(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""The type of such a setting: an int, which options and TOML files may also give as "64K"."""
