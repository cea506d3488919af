"""Marks of a module on its own parameters: the dtype they live in, and whether weight decay pulls at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

_NARROW = (torch.bfloat16, torch.float16)


class ExactParameters(nn.Module):
    """A module with parameters that 16 bits cannot hold, such as angles and decays: they stay fp32 in any cast to a
    16-bit dtype, and weight decay, which pulls matrices towards zero, leaves them alone.
    """

    exact: tuple[str, ...] = ()
    """Names of these parameters; all of them are the module's own."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactParameters:
        before = {name: getattr(self, name).detach() for name in self.exact}
        super()._apply(fn, recurse)
        for name, value in before.items():
            parameter = getattr(self, name)
            if parameter.dtype in _NARROW:
                parameter.data = value.to(parameter.device, torch.float32)
        return self


def exact_parameter(*shape: int) -> nn.Parameter:
    """A new one, uninitialised: fp32 at least, also where 16 bits are the default."""
    return nn.Parameter(torch.empty(*shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))


def decaying_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters of `model` that weight decay is for: weight matrices, not vectors (norms, biases), nor
    what its module calls exact."""
    for prefix, module in model.named_modules():
        exact = module.exact if isinstance(module, ExactParameters) else ()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and name not in exact:
                yield f"{prefix}.{name}" if prefix else name, parameter
