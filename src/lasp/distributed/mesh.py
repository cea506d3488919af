"""Processes as a mesh: data parallel x sequence parallel.

Axes, outermost first:
    dp_replicate   groups that train on different sequences and hold the same weights
    sp             processes that hold consecutive shards of the same sequences
`sp` is innermost, so a sequence's processes are consecutive global ranks: neighbours in a sequence are neighbours
on a host, where launchers number processes host by host. This file is the only place that turns one kind of rank
into the other.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

DP_AXIS = "dp_replicate"
SP_AXIS = "sp"


def build_mesh(*, sp: int, dp: int | None = None, device_type: str = "cpu", timeout_s: float = 120.0) -> DeviceMesh:
    """A mesh ("dp_replicate", "sp") over all processes; collective over the world.

    sp: processes per sequence. dp: groups of them; None takes all there are.
    device_type: "cpu" (gloo) or "cuda" (NCCL). timeout_s: deadline of every wait within the groups made here.

    Raises ValueError if there is no process group or the sizes do not fit the number of processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "there is no process group: start the program with `torchrun --nproc-per-node N program.py` and call "
            "torch.distributed.init_process_group() before building a mesh"
        )
    world = dist.get_world_size()
    if sp < 1 or (dp is not None and dp < 1):
        raise ValueError(f"mesh sizes must be at least 1, got dp={dp}, sp={sp}")
    if world % sp:
        raise ValueError(
            f"the world of {world} processes cannot be split into sequence groups of sp={sp}: "
            f"start a multiple of {sp} processes or choose an sp that divides {world}"
        )
    dp = world // sp if dp is None else dp
    if dp * sp != world:
        raise ValueError(
            f"dp={dp} x sp={sp} needs {dp * sp} processes, but the world has {world}: "
            f"start {dp * sp} processes or use dp={world // sp}"
        )
    ranks = torch.arange(world).view(dp, sp)
    backend = "nccl" if device_type == "cuda" else "gloo"
    # Groups are made here, not by init_device_mesh, because that gives them the default deadline of half an hour.
    sequences = _own_group(ranks.tolist(), backend, timeout_s)
    replicas = _own_group(ranks.t().tolist(), backend, timeout_s)
    return DeviceMesh.from_group([replicas, sequences], device_type, ranks, mesh_dim_names=(DP_AXIS, SP_AXIS))


def _own_group(partition: list[list[int]], backend: str, timeout_s: float) -> dist.ProcessGroup:
    """Make the groups of a partition of the world, in the same order everywhere; return this process's own."""
    own = None
    for ranks in partition:
        group = dist.new_group(ranks, backend=backend, timeout=timedelta(seconds=timeout_s))
        if dist.get_rank() in ranks:
            own = group
    assert own is not None
    return own
