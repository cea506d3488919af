"""Ranks: communication and meshes."""

import torch.distributed as dist

if not dist.is_initialized():
    # Default arguments of its functions are the group of all processes as it is when the module is first imported, and
    # that holds the group, with its threads, beyond destroy_process_group: a process then may abort at its end. DDP and
    # PyTorch's compiler import it when they are first used. It costs 3 ms.
    import torch.distributed.nn.functional  # noqa: F401

from lasp.distributed.comm import Comm, Counters, ExchangeError

__all__ = ["Comm", "Counters", "ExchangeError"]
