"""PyTorch's own ring attention (`torch.distributed.tensor.experimental.context_parallel`), on GPUs only.

It replaces scaled_dot_product_attention while its context lasts. Each rank holds two of 2 W slices of the sequence, one
from the front and one from the back, so that causal attention costs every rank the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel


def tokens_of(rank: int, size: int, total: int) -> Tensor:
    """The tokens of a sequence of `total`, a multiple of 2 `size`, that lie on a rank, in its order."""
    slices = torch.arange(total).chunk(2 * size)
    return torch.cat((slices[rank], slices[2 * size - 1 - rank]))


@contextmanager
def torch_ring(mesh: DeviceMesh, backend: SDPBackend) -> Iterator[Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """While it lasts, causal softmax attention of this rank's q, k, v [B, n, H, D], as `tokens_of` says."""
    from torch.distributed.tensor.experimental import context_parallel

    # It cuts the buffers that it is given, and needs one; what is called here is cut already.
    unused = torch.zeros(1, 2 * mesh.size(), device=mesh.device_type)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    with sdpa_kernel(backend), context_parallel(mesh, buffers=[unused], buffer_seq_dims=[1]):
        yield attention
