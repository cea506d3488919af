"""Selects the implementation that runs a recurrence's stages.

Each backend is a package beside this file whose `STAGES` has a record for each family that it implements. It is
imported when first asked for, by a plain statement, which torch.compile can follow.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping

import torch

from lasp.kernels.limits import FUSED_CAPABILITY, FUSED_DTYPES, FUSED_MAX_DIM, value_pieces
from lasp.recurrence.inputs import Inputs
from lasp.recurrence.stages import AnyStages

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "fla", "reference", "torch", "triton")
_loaded: dict[tuple[str, str], AnyStages] = {}
_chosen: dict[tuple[str, torch.device, torch.dtype, int], str] = {}


def select(family: str, backend: str, x: Inputs) -> AnyStages:
    """The stages of `family` for the inputs `x`; "auto" is "triton" where its kernels run, else "torch".

    Raises:
        ValueError: the backend is unknown, or does not implement the family.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        columns = x.v.shape[3]
        dim = max(x.q.shape[3], columns // value_pieces(columns) if family == "delta" else columns)
        key = (family, x.q.device, x.q.dtype, dim)
        backend = _chosen.get(key) or _choose(*key)
    return load(family, backend)


def _choose(family: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    reason = _against_triton(family, device, dtype, dim)
    backend = "torch" if reason else "triton"
    if not torch.compiler.is_compiling():  # which keeps no choices, and calls no logger
        _chosen[family, device, dtype, dim] = backend
        logger.info("backend auto of the %s recurrence: %s%s", family, backend, f" ({reason})" if reason else "")
    return backend


def _against_triton(family: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """The reason that the fused kernels are not for these inputs; empty where they are."""
    if family not in ("decay", "delta"):
        return "no fused kernels for it"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the tensors are on {device.type}, the fused kernels run on CUDA"
    if torch.cuda.get_device_properties(device).major < FUSED_CAPABILITY:
        return f"the GPU's compute capability is below {FUSED_CAPABILITY}.0"
    if dtype not in FUSED_DTYPES or dim > FUSED_MAX_DIM:
        return f"{dtype} with heads of {dim} channels; the fused kernels take 16 and 32 bits up to {FUSED_MAX_DIM}"
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def load(family: str, backend: str) -> AnyStages:
    """The stages of `family` that `backend` has.

    Raises:
        ValueError: it has none.
    """
    stages = _loaded.get((family, backend))
    if stages is not None:
        return stages
    families = _families(backend)
    if family not in families:
        raise ValueError(f"backend {backend!r} has no kernels for this recurrence (it has: {', '.join(families)})")
    if not torch.compiler.is_compiling():
        _loaded[family, backend] = families[family]
    return families[family]


def _families(backend: str) -> Mapping[str, AnyStages]:
    if backend == "triton":
        from lasp.kernels import triton

        return triton.STAGES
    if backend == "fla":
        from lasp.kernels import fla

        return fla.STAGES
    if backend == "reference":
        from lasp.kernels import reference

        return reference.STAGES
    from lasp.kernels import torch

    return torch.STAGES
