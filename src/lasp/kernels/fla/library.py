"""flash-linear-attention as found on this machine: its kernels, or why they cannot be used.

The stages need its kernels one by one, which its authors may change from release to release: hence one version,
the one the adapter was checked with.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

VERSION = "0.6.0"


class Kernels(NamedTuple):
    """Functions that the adapter calls, by module of `fla.ops`."""

    cumsum: Any
    states: Any
    outputs: Any
    gated: Any
    gated_solve: Any
    channel_solve: Any
    channel_gradients: Any
    gla: Any


@cache
def kernels() -> Kernels:
    """fla's kernel modules.

    Raises:
        ValueError: it is not installed, or not in the version this adapter knows.
    """
    try:
        found = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f'backend "fla" needs flash-linear-attention: pip install "fla-core=={VERSION}"') from None
    if found != VERSION:
        raise ValueError(f'backend "fla" knows fla-core {VERSION}, found {found}: pip install "fla-core=={VERSION}"')
    return Kernels(
        *(
            importlib.import_module(f"fla.ops.{name}")
            for name in (
                "utils",
                "common.chunk_delta_h",
                "common.chunk_o",
                "gated_delta_rule.wy_fast",
                "gated_delta_rule.chunk_fwd",
                "kda.chunk_intra",
                "kda.chunk_bwd",
                "gla.chunk",
            )
        )
    )


def refuse(v: Tensor, keys: int, gate_dims: int | None) -> None:
    """Refuse what fla cannot compute, or computes wrongly.

    Args:
        v: the values.
        keys: K.
        gate_dims: dims of the gate, None without.

    Raises:
        ValueError: with what to do instead.
    """
    if not v.is_cuda:
        raise ValueError(f'backend "fla" runs on GPUs, the tensors are on {v.device}: use backend="torch"')
    if v.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f'backend "fla" takes bf16 and fp16, got {v.dtype}: use backend="torch"')
    if keys > 256:
        raise ValueError(f'backend "fla" takes at most 256 key channels, got {keys}: use backend="torch"')
    if gate_dims == 3 and torch.cuda.get_device_capability(v.device)[0] == 9:
        check_triton(importlib.metadata.version("triton"))


def check_triton(version: str) -> None:
    """Refuse compilers known to miscompile the gated backward pass on Hopper.

    fla refuses the same range itself (its issue 640), in the middle of a backward pass. KDA's kernels are others.

    Raises:
        ValueError: `version` is one of them.
    """
    major, minor, patch = (int(part) for part in (*re.findall(r"\d+", version), "0", "0")[:3])
    if (3, 4, 0) <= (major, minor, patch) < (3, 7, 1):
        raise ValueError(
            f"Triton {version} computes wrong gradients in fla's gated delta rule on Hopper GPUs: install Triton "
            '>= 3.7.1, or use backend="torch", or spread the gate over the key channels, g[..., None].expand(-1, -1, '
            "-1, K), for which fla has other, slower kernels"
        )
