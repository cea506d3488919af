"""transformers' functions in the place of which, during a split pass, this library's operators run.

A modeling file calls them by their global names. Those names are bound to dispatchers, once a file: outside of a split
pass a dispatcher calls what was there, so that other models of the file are computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import MethodType
from typing import Any

from lasp.hf.context import MixerFrame, ModelPass, split_frame, split_pass
from lasp.hf.split import is_used
from lasp.hf.table import OF_MODEL, OPTIONAL, PACKAGE, ModelFamily, Operator
from lasp.recurrence.untraced import untraced


class Dispatcher:
    """Stands in the place of `original`: within a split pass it runs `operator`, which is told of the pass."""

    def __init__(self, name: str, original: Any, operator: Operator) -> None:
        self.__name__ = name
        self.__wrapped__, self._operator = original, operator
        self._current: Callable[[], MixerFrame | ModelPass | None] = split_pass if name in OF_MODEL else split_frame

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _dispatched(self, arguments, options)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Bind it, where it stands in the place of a method."""
        return self if instance is None else MethodType(self, instance)

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
    """Operators of the functions to be dispatched of a file, by their names there, of methods "Class.method"."""
    found = {name: operator for functions in family.mixers.values() for name, operator in functions.items()}
    others = {**OPTIONAL, **OF_MODEL}
    return found | {name: operator for name, operator in others.items() if _found(family, name) is not None}


def missing(family: ModelFamily) -> list[str]:
    """Functions that the mixers of this file are to call, and which it does not have."""
    return [name for name in functions_of(family) if not callable(_found(family, name))]


def dispatch(family: ModelFamily) -> None:
    """Bind a file's functions to dispatchers, where they are not."""
    for name, operator in functions_of(family).items():
        original = _found(family, name)
        if not isinstance(original, Dispatcher):
            setattr(_holder(family, name), name.split(".")[-1], Dispatcher(name, original, operator))


def release(family: ModelFamily) -> None:
    """Leave the file as it was, where no model needs its dispatchers any longer."""
    for name in functions_of(family) if not is_used(family.file) else ():
        found = _found(family, name)
        if isinstance(found, Dispatcher):
            setattr(_holder(family, name), name.split(".")[-1], found.__wrapped__)


def _holder(family: ModelFamily, name: str) -> Any:
    """The file's module, or the class in it that has the method."""
    module = import_module(PACKAGE + family.file)
    return getattr(module, name.split(".")[0], None) if "." in name else module


def _found(family: ModelFamily, name: str) -> Any:
    return getattr(_holder(family, name), name.split(".")[-1], None)
