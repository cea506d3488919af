"""transformers' code in fp64 throughout, which computes recurrences, norms and losses in fp32 whatever a model has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class exactly(TorchFunctionMode):
    """Within, what asks for fp32 gets fp64. Recomputation in backward needs it anew."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        options = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return function(*(_wider(value) for value in args), **options)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
