"""Memory on every GPU of a group that the group's other GPUs can read and write, by PyTorch's symmetric memory."""

from __future__ import annotations

import logging
from contextlib import suppress

import torch
from torch import Tensor

from lasp.distributed.comm import Comm

logger = logging.getLogger("lasp.distributed")
# What keeps the mappings alive. Kernels in captured graphs hold their addresses, so they live as long as the process.
_kept: list[object] = []


def symmetric_memory(comm: Comm, nbytes: int, device: torch.device) -> list[Tensor] | None:
    """`nbytes` of every rank, mapped into this process, all zero: uint8 [nbytes] each.

    Collective. None, on all ranks alike, where the GPUs are not of one host or cannot reach each other's memory.
    """
    if not comm.everywhere(_reach_each_other(comm, device)):
        return None
    buffers: list[Tensor] | None = None
    try:
        import torch.distributed._symmetric_memory as symmetric

        own = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        own.zero_()
        torch.cuda.synchronize(device)
        handle = symmetric.rendezvous(own, comm.group)
        buffers = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(comm.size)]
        buffers[comm.rank] = own
        _kept.append((own, handle, buffers))
    except (RuntimeError, AttributeError, ImportError) as error:
        logger.info("no memory is shared between the GPUs of %s: %s", comm.global_ranks, error)
    # All have zeroed theirs when all are here.
    return buffers if comm.everywhere(buffers is not None) else None


def _reach_each_other(comm: Comm, device: torch.device) -> bool:
    """True if this rank's GPU can write to those of all others."""
    if device.type != "cuda" or comm.backend != "nccl" or len(comm.nodes) > 1:
        comm.gathered(-1)
        return False
    indices = comm.gathered(torch.cuda.current_device() if device.index is None else device.index)
    own = indices[comm.rank]
    # Ranks that each see one GPU only call it by the same number: which can reach which is not known then.
    if len(set(indices)) < comm.size or max(indices) >= torch.cuda.device_count():
        return False
    with suppress(RuntimeError):
        return all(other == own or torch.cuda.can_device_access_peer(own, other) for other in indices)
    return False
