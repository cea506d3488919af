"""The end of a compiled graph: around what torch.compile cannot follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def break_graph(what: str) -> None:
    """End the compiler's graph here; under fullgraph=True its error says so and names `what`."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            msg=f"{what} cannot be part of a compiled graph: leave fullgraph=True out, and the graph breaks around the "
            "operator, or call it outside of the compiled function"
        )


def untraced(function: _Function, what: str | None = None) -> _Function:
    """`function`, around which a compiled graph breaks. what: it is, for those who ask for a whole graph; its name.

    As `torch.compiler.disable`, which loads the compiler: half of the time that importing this library would take.
    PyTorch's own way loads it at the first call, so uncompiled calls do not go by it.
    """
    disabled, named = torch._disable_dynamo(function), what or function.__qualname__

    @wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            break_graph(named)
            return disabled(*arguments, **options)
        return function(*arguments, **options)

    return cast(_Function, wrapped)


def untraced_over_ranks(function: _Function, name: str | None = None) -> _Function:
    """`function`, which takes a keyword `sp`: a compiled graph breaks around it where other ranks take part.

    name: that users know it by; its own if None.
    """
    outside = untraced(function, f"{name or function.__name__} over several ranks")

    @wraps(function)
    def wrapped(*arguments: Any, sp: Any = None, **options: Any) -> Any:
        if torch.compiler.is_compiling() and sp is not None and sp.size > 1:
            return outside(*arguments, sp=sp, **options)
        return function(*arguments, sp=sp, **options)

    return cast(_Function, wrapped)


def cached(maxsize: int) -> Callable[[_Function], _Function]:
    """`functools.lru_cache` outside of compiled graphs, whose compiler would trace what is within it, and warn."""

    def decorate(function: _Function) -> _Function:
        kept = lru_cache(maxsize=maxsize)(function)

        @wraps(function)
        def wrapped(*arguments: Any) -> Any:
            return function(*arguments) if torch.compiler.is_compiling() else kept(*arguments)

        return cast(_Function, wrapped)

    return decorate
