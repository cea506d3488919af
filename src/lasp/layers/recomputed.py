"""Parts of layers that run again in the backward pass, rather than keep what they make."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

R = TypeVar("R")


def recomputed(run: Callable[..., R], *arguments: Any) -> R:
    """run(*arguments), which keeps its arguments alone for the backward pass. Nothing in it may be random.

    A product of matrices at its end is not computed again: what that keeps, its input, is there before.
    """
    if not torch.is_grad_enabled():
        return run(*arguments)
    result: R = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
