"""Which implementation runs a recurrence's stages.

Each backend is a package beside this file whose attributes are the families it implements.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import cast

from lasp.recurrence.contract import Stages

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "fla", "reference", "torch", "triton")


@cache
def _load(family: str, backend: str) -> Stages:
    package = importlib.import_module(f"lasp.kernels.{backend}")
    if family not in package.__all__:
        raise ValueError(
            f"backend {backend!r} has no kernels for this recurrence (it has: {', '.join(package.__all__)})"
        )
    logger.debug("stages of the %s recurrence: backend %s", family, backend)
    return cast(Stages, getattr(package, family))


def select(family: str, backend: str) -> Stages:
    """The stages of `family`; "auto" is "torch".

    Raises:
        ValueError: the backend is unknown, or does not implement the family.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return _load(family, "torch" if backend == "auto" else backend)
