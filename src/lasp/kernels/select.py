"""Which implementation runs a recurrence's stages.

Each backend is a package beside this file whose attributes are the families it implements. It is imported when first
asked for, by a plain statement, which torch.compile can follow.
"""

from __future__ import annotations

import importlib.util
import logging
from types import ModuleType
from typing import Any, cast

import torch

from lasp.recurrence.stages import Stages

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "fla", "reference", "torch", "triton")
# What the fused kernels take, and where they have been run (docs/kernels.md).
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FUSED_MAX_DIM = 256
FUSED_CAPABILITY = 8
_chosen: dict[tuple[str, torch.device, torch.dtype, int], str] = {}


def select(family: str, backend: str, x: Any) -> Stages:
    """The stages of `family` for the inputs `x`; "auto" is "triton" where its kernels run, else "torch".

    Raises:
        ValueError: the backend is unknown, or does not implement the family.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        key = (family, x.q.device, x.q.dtype, max(x.q.shape[3], x.v.shape[3]))
        backend = _chosen.get(key) or _choose(*key)
    return _load(family, backend)


def _choose(family: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    reason = _against_triton(family, device, dtype, dim)
    backend = "torch" if reason else "triton"
    if not torch.compiler.is_compiling():  # which keeps no choices, and calls no logger
        _chosen[family, device, dtype, dim] = backend
        logger.info("backend auto of the %s recurrence: %s%s", family, backend, f" ({reason})" if reason else "")
    return backend


def _against_triton(family: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Why the fused kernels are not for these inputs; empty where they are."""
    if family != "decay":
        return "no fused kernels for it"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the tensors are on {device.type}, the fused kernels run on CUDA"
    if torch.cuda.get_device_properties(device).major < FUSED_CAPABILITY:
        return f"the GPU's compute capability is below {FUSED_CAPABILITY}.0"
    if dtype not in FUSED_DTYPES or dim > FUSED_MAX_DIM:
        return f"{dtype} with heads of {dim} channels; the fused kernels take 16 and 32 bits up to {FUSED_MAX_DIM}"
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _load(family: str, backend: str) -> Stages:
    package = _package(backend)
    if family not in package.__all__:
        raise ValueError(
            f"backend {backend!r} has no kernels for this recurrence (it has: {', '.join(package.__all__)})"
        )
    return cast(Stages, getattr(package, family))


def _package(backend: str) -> ModuleType:
    if backend == "triton":
        from lasp.kernels import triton

        return triton
    if backend == "fla":
        from lasp.kernels import fla

        return fla
    if backend == "reference":
        from lasp.kernels import reference

        return reference
    from lasp.kernels import torch

    return torch
