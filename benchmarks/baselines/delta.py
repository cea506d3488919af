"""Gated DeltaNet by FlashQLA: on one GPU, and over the GPUs of a group by its own context parallelism.

Installed with `pip install flash-qla` (wheels flash_qla, tilelang, apache-tvm-ffi, z3-solver, torch-c-dlpack-ext,
cloudpickle, ml-dtypes; it compiles its kernels with nvcc, which takes minutes). K = V = 128, 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 64


def flashqla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, bounds: Sequence[int] | None = None) -> Tensor:
    """o [B, T, H_v, V], of packed documents where `bounds` are given."""
    from flash_qla import chunk_gated_delta_rule

    ends = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=q.device)
    return chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=ends)[0]


def flashqla_over(group: Any, heads: int) -> Callable[..., Tensor]:
    """The method over the ranks of a group, of equal consecutive shards; heads: of values."""
    contexts: dict[int, Any] = {}

    def method(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        from flash_qla import chunk_gated_delta_rule
        from flash_qla.ops.gated_delta_rule.chunk.cp import build_cp_context

        tokens = q.shape[1]
        if tokens not in contexts:
            ends = torch.tensor([0, tokens * group.size()], dtype=torch.int32, device=q.device)
            modes = {"enable_inter": True, "enable_intra": True, "is_train": True}
            contexts[tokens] = build_cp_context(ends, group=group, num_v_heads=heads, chunk_size=CHUNK, **modes)
        return chunk_gated_delta_rule(q, k, v, g, beta, cp_context=contexts[tokens])[0]

    return method
