"""transformers, loaded when it is first needed."""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn
from torch.torch_version import TorchVersion

OLDEST = "5.17"
_INSTALL = "pip install 'transformers>=5.17,<6'"
# What its versions and models call a cache.
CACHES = ("cache", "past_key_values", "cache_params")


@cache
def load(module: str = "") -> Any:
    """The package, or a module of it.

    Raises:
        ValueError: it is not installed, or too old.
    """
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ValueError(f"lasp.hf needs transformers: {_INSTALL}") from None
    if TorchVersion(found) < OLDEST:
        raise ValueError(f"lasp.hf needs transformers {OLDEST} or newer, found {found}: {_INSTALL}")
    return import_module(f"transformers.{module}" if module else "transformers")


def seedable_sampler(data: Any, generator: Any, seed: int) -> Any:
    """accelerate's sampler of `data` in random order, the same on every process and another in every epoch."""
    kind = import_module("accelerate.data_loader").SeedableRandomSampler
    return kind(data, generator=generator, data_seed=seed)


def cache_argument(module: nn.Module) -> str | None:
    """The name by which a module's forward takes a cache."""
    known = inspect.signature(type(module).forward).parameters
    return next((name for name in CACHES if name in known), None)
