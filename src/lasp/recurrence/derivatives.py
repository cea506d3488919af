"""Raises where a derivative is asked of a backward pass that has none.

PyTorch's `once_differentiable` raises only where the gradients that come in depend on something, and then only if the
way back leads through them. What else the backward pass reads, queries in the gradient of keys, is a constant to it:
`grad(.., create_graph=True)` then gives second derivatives that lack terms, without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Backward = TypeVar("_Backward", bound=Callable[..., Any])


def first_derivatives(operator: str, *, linear: bool = False) -> Callable[[_Backward], _Backward]:
    """Decorate the `backward` of an autograd function: it raises RuntimeError if it is to be differentiated itself.

    Args:
        operator: what the message names.
        linear: the function is linear, so that its backward pass reads nothing but the gradients that come in: where
            these are constants, what it gives is one too, and is right.
    """

    def decorate(backward: _Backward) -> _Backward:
        @wraps(backward)
        def checked(ctx: Any, *gradients: Any) -> Any:
            if not torch.is_grad_enabled():  # as it is but under create_graph=True
                return backward(ctx, *gradients)
            varies = not linear or any(isinstance(d, Tensor) and d.requires_grad for d in gradients)
            # A compiled graph cannot raise; its compiler has a check of its own.
            if varies and not torch.compiler.is_compiling():
                raise RuntimeError(f"{operator} has first derivatives only: leave out create_graph=True")
            with torch.no_grad():
                return backward(ctx, *gradients)

        return cast(_Backward, checked)

    return decorate
