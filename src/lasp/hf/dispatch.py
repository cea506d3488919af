"""transformers' functions in the place of which, during a split pass, this library's operators run.

A modeling file calls them by their global names. Those names are bound to dispatchers, once a file: outside of a split
pass a dispatcher calls what was there, so that other models of the file are computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from lasp.hf.context import MixerFrame, ModelPass, split_frame, split_pass
from lasp.hf.split import is_used
from lasp.hf.table import OF_MODEL, OPTIONAL, PACKAGE, ModelFamily, Operator
from lasp.sequence.graph import untraced


class Dispatcher:
    """Stands in the place of `original`: within a split pass it runs `operator`, which is told of the pass."""

    def __init__(self, name: str, original: Any, operator: Operator) -> None:
        self.__name__ = name
        self.__wrapped__, self._operator = original, operator
        self._current: Callable[[], MixerFrame | ModelPass | None] = split_pass if name in OF_MODEL else split_frame

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _dispatched(self, arguments, options)

    def run(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        current = self._current()
        if current is None:
            return self.__wrapped__(*arguments, **options)
        if isinstance(current, MixerFrame):
            current.wanted.discard(self.__name__)
        return self._operator(current, *arguments, **options)


# Hidden from the compiler: a compiled layer's graph breaks here.
_dispatched = untraced(Dispatcher.run)


def functions_of(family: ModelFamily) -> dict[str, Operator]:
    """Operators of the functions to be dispatched of a file, by global name."""
    found = {name: operator for functions in family.mixers.values() for name, operator in functions.items()}
    module = import_module(PACKAGE + family.file)
    others = {**OPTIONAL, **OF_MODEL}
    return found | {name: operator for name, operator in others.items() if hasattr(module, name)}


def missing(family: ModelFamily) -> list[str]:
    """Functions that the mixers of this file are to call, and which it does not have."""
    module = import_module(PACKAGE + family.file)
    return [name for name in functions_of(family) if not callable(getattr(module, name, None))]


def dispatch(family: ModelFamily) -> None:
    """Bind a file's functions to dispatchers, where they are not."""
    module = import_module(PACKAGE + family.file)
    for name, operator in functions_of(family).items():
        original = getattr(module, name)
        if not isinstance(original, Dispatcher):
            setattr(module, name, Dispatcher(name, original, operator))


def release(family: ModelFamily) -> None:
    """Leave the file as it was, where no model needs its dispatchers any longer."""
    if is_used(family.file):
        return
    module = import_module(PACKAGE + family.file)
    for name in functions_of(family):
        found = getattr(module, name, None)
        if isinstance(found, Dispatcher):
            setattr(module, name, found.__wrapped__)
