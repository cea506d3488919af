"""The LASP authors' own functions, from a checkout of their repository (OpenNLPLab/LASP); nothing of them is here.

Their tensors are [B, H, n, D], and so are those given here: a user of theirs has them so. Slopes are minus the log
decays, [H, 1, 1] in fp32; outputs are not scaled. The state goes from each rank to the next of the world, whatever the
group: the group is all ranks, and the first one holds the first tokens. "fuse_parallel" wants n a multiple of 256.
Where a variant wants buffers it gets the same ones in every call; positions are in fp32, as bf16 rounds them from 256
on.

H heads of D channels, n tokens on each of W ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Method = Callable[[Tensor, Tensor, Tensor], Tensor]
_NAME = "lasp_authors"


def authors_package(checkout: Path) -> ModuleType:
    """Their package `lasp`, under a name that is not this library's."""
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    folder = checkout / "lasp"
    spec = spec_from_file_location(_NAME, folder / "__init__.py", submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None or not (folder / "lasp_naive.py").exists():
        raise ValueError(
            f"expected a checkout of the LASP authors' repository, found no lasp/lasp_naive.py in {checkout}"
        )
    module = module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
    return module


def authors_methods(checkout: Path, log_decay: Tensor, head_dim: int, size: int) -> tuple[dict[str, Method], Method]:
    """Their variants over all `size` ranks of the world, by name, and their kernel on one rank.

    Collective, and once in a process: their groups are global. log_decay [H], head_dim D; a method takes q, k, v
    [1, H, n, D] and gives o [1, H, n, D].
    """
    theirs = authors_package(checkout)
    theirs.initialize_lasp(1, size)
    slopes = -log_decay.float().view(-1, 1, 1)
    state, d_state = (slopes.new_empty(1, len(log_decay), head_dim, head_dim) for _ in range(2))

    @cache
    def positions(tokens: int) -> Tensor:
        return torch.arange(tokens, dtype=torch.float32, device=slopes.device)

    variants: dict[str, Method] = {
        "naive": lambda q, k, v: theirs.lasp_naive(q, k, v, slopes),
        "cache": lambda q, k, v: theirs.lasp_cache(q, k, v, slopes, positions(q.shape[2]), state, d_state),
        "fuse": lambda q, k, v: theirs.lasp_fuse(q, k, v, slopes, state, d_state),
        "fuse_parallel": lambda q, k, v: theirs.lasp_fuse_parallel(q, k, v, slopes, state, d_state),
    }
    return variants, lambda q, k, v: theirs.lightning_attn(q, k, v, slopes)
