"""LASP: linear attention sequence parallelism for PyTorch.

The program `lasp` loads nothing with this package, PyTorch neither: its guard must stand before the seconds that takes.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lasp.distributed import ExchangeError
    from lasp.halo import short_convolution, token_shift
    from lasp.ops import (
        delta_rule,
        delta_rule_begin,
        linear_attention,
        linear_attention_begin,
        normalized_linear_attention,
        normalized_linear_attention_begin,
    )
    from lasp.sequence import SequenceParallel
    from lasp.softmax import softmax_attention

__version__ = "0.1.0"
__all__ = [
    "ExchangeError",
    "SequenceParallel",
    "delta_rule",
    "delta_rule_begin",
    "linear_attention",
    "linear_attention_begin",
    "normalized_linear_attention",
    "normalized_linear_attention_begin",
    "short_convolution",
    "softmax_attention",
    "token_shift",
]
_HOMES = {
    "ExchangeError": "distributed",
    "SequenceParallel": "sequence",
    "delta_rule": "ops",
    "delta_rule_begin": "ops",
    "linear_attention": "ops",
    "linear_attention_begin": "ops",
    "normalized_linear_attention": "ops",
    "normalized_linear_attention_begin": "ops",
    "short_convolution": "halo",
    "softmax_attention": "softmax",
    "token_shift": "halo",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(import_module(f"lasp.{_HOMES[name]}"), name)
    elif not name.startswith("_") and find_spec(f"lasp.{name}") is not None:
        found = import_module(f"lasp.{name}")
    else:
        raise AttributeError(f"module 'lasp' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_program() -> bool:
    """True if the package is loaded to run the program `lasp`; `python -m` puts the module's path there later."""
    return bool(sys.argv) and (sys.argv[0] == "-m" or Path(sys.argv[0]).stem == "lasp")


# Others load everything at once, before process groups exist: see lasp.distributed.
if not _is_program():
    for _name in _HOMES:
        __getattr__(_name)
