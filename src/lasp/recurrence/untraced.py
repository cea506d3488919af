"""Functions that torch.compile leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """`function`, around which a compiled graph breaks.

    As `torch.compiler.disable`, which loads the compiler: half of the time that importing this library would take.
    PyTorch's own way loads it at the first call, so uncompiled calls do not go by it.
    """
    disabled = torch._disable_dynamo(function)

    @wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return disabled(*arguments, **options)
        return function(*arguments, **options)

    return cast(_Function, wrapped)
