"""Selects the implementation that runs a recurrence's stages.

Each backend is a package beside this file whose `STAGES` has a record for each family that it implements. It is
imported when first asked for, by a plain statement, which torch.compile can follow. Nothing that a compiled graph
reads is kept here: operators select while the compiler traces, and what changes then breaks the graph's own guards.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping

import torch

from lasp.kernels.limits import FUSED_CAPABILITY, FUSED_DTYPES, FUSED_MAX_DIM, against_keys
from lasp.recurrence.inputs import Inputs
from lasp.recurrence.stages import AnyStages

logger = logging.getLogger(__name__)

FUSED_FAMILIES = ("decay", "delta")
BACKENDS = ("auto", "fla", "reference", "torch", "triton")
_chosen: dict[tuple[str, torch.device, torch.dtype, int, bool], str] = {}


def select(family: str, backend: str, x: Inputs) -> AnyStages:
    """The stages of `family` for the inputs `x`; "auto" is "triton" where its kernels run, else "torch".

    Raises:
        ValueError: the backend is unknown, or does not implement the family.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        keys = int(x.q.shape[3]) if family == "delta" else 0  # whose heads of wide keys cannot be cut
        backend = _choose(family, x.q.device, x.q.dtype, keys, x.g is not None and x.g.dim() == 4)
    return load(family, backend, x)


def _choose(family: str, device: torch.device, dtype: torch.dtype, keys: int = 0, per_channel: bool = False) -> str:
    """Choose, and say once what: as a warning where a GPU falls to PyTorch, many times slower.

    keys: channels of heads that cannot be cut, else 0. per_channel: whether there is a gate for each.
    """
    key = (family, device, dtype, keys, per_channel)
    if key not in _chosen:
        reason = _against_triton(*key)
        _chosen[key] = "torch" if reason else "triton"
        slow = reason and device.type == "cuda" and family in FUSED_FAMILIES
        what = f"backend auto of the {family} recurrence: {_chosen[key]}" + (f" ({reason})" if reason else "")
        logger.log(logging.WARNING if slow else logging.INFO, what)
    return _chosen[key]


def has_fused_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether the kernels of what stands around recurrences run there."""
    key = ("neighbours", device, dtype, 0, False)
    if key not in _chosen:
        _chosen[key] = "torch" if _against_triton("decay", *key[1:]) else "triton"
    return _chosen[key] == "triton"


def has_fused_delta_rules(device: torch.device, dtype: torch.dtype, keys: int) -> bool:
    """Say whether "auto" takes the kernels for delta rules of so many channels of keys there, whatever their decay."""
    return not any(_against_triton("delta", device, dtype, keys, per_channel) for per_channel in (False, True))


# torch.compile calls them as they stand while it traces: `torch.compiler.assume_constant_result` says the same, and
# loads the compiler.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
has_fused_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]
has_fused_delta_rules._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _against_triton(family: str, device: torch.device, dtype: torch.dtype, keys: int, per_channel: bool) -> str:
    """The reason that the fused kernels are not for these inputs; empty where they are."""
    if family not in FUSED_FAMILIES:
        return "no fused kernels for it"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the tensors are on {device.type}, the fused kernels run on CUDA"
    properties = torch.cuda.get_device_properties(device)
    if properties.major < FUSED_CAPABILITY:
        return f"the GPU's compute capability is below {FUSED_CAPABILITY}.0"
    if dtype not in FUSED_DTYPES:
        return f"the fused kernels take 16 and 32 bits, not {dtype}"
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    if keys > 0 and (reason := against_keys(keys, per_channel, dtype, shared)):
        return reason
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def load(family: str, backend: str, x: Inputs) -> AnyStages:
    """The stages of `family` that `backend` has for heads as wide as those of `x`.

    Raises:
        ValueError: it has none.
    """
    stages = _load(family, backend)
    return stages if stages.wide is None or max(x.q.shape[3], x.v.shape[3]) <= FUSED_MAX_DIM else stages.wide


def _load(family: str, backend: str) -> AnyStages:
    families = _families(backend)
    if family not in families:
        raise ValueError(f"backend {backend!r} has no kernels for this recurrence (it has: {', '.join(families)})")
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
