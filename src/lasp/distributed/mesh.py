"""Processes as a mesh: data parallel x sequence parallel.

Axes, outermost first:
    dp_replicate   copies of the weights, each of which may be spread over all processes of a copy
    dp_shard       groups within a copy that train on different sequences
    sp             processes that hold consecutive shards of the same sequences
`sp` is innermost, so a sequence's processes are consecutive global ranks: neighbours in a sequence are neighbours
on a host, where launchers number processes host by host. This file is the only place that turns one kind of rank
into the other.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

REPLICATE_AXIS = "dp_replicate"
SHARD_AXIS = "dp_shard"
SP_AXIS = "sp"
WEIGHTS_AXIS = "dp_shard_sp"
# How weights are spread over (dp_shard, sp): see lasp.parallelize.
DATA_PARALLEL = ("ddp", "zero1", "zero2", "zero3")


def build_mesh(
    *,
    sp: int,
    dp: int | None = None,
    dp_replicate: int = 1,
    device_type: str = "cpu",
    timeout_s: float = 120.0,
) -> DeviceMesh:
    """A mesh ("dp_replicate", "dp_shard", "sp") over all processes; collective over the world.

    sp: processes per sequence. dp: groups of them; None takes all there are. dp_replicate: copies of sharded
    weights, a divisor of dp; dp_shard is what remains. Where every process holds all weights anyway, it is 1.
    device_type: "cpu" (gloo) or "cuda" (NCCL). timeout_s: deadline of every wait within the groups made here.

    Raises ValueError if there is no process group or the sizes do not fit the number of processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "there is no process group: start the program with `torchrun --nproc-per-node N program.py` and call "
            "torch.distributed.init_process_group() before building a mesh"
        )
    world = dist.get_world_size()
    if sp < 1 or dp_replicate < 1 or (dp is not None and dp < 1):
        raise ValueError(f"mesh sizes must be at least 1, got dp={dp}, dp_replicate={dp_replicate}, sp={sp}")
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
    if dp % dp_replicate:
        raise ValueError(
            f"dp_replicate must divide dp={dp}, the groups of processes with a sequence, got {dp_replicate}"
        )
    ranks = torch.arange(world).view(dp_replicate, dp // dp_replicate, sp)
    return _mesh(ranks, (REPLICATE_AXIS, SHARD_AXIS, SP_AXIS), device_type, _backend(device_type), timeout_s)


def weights_mesh(mesh: DeviceMesh, *, offload: bool = False, timeout_s: float = 120.0) -> DeviceMesh:
    """The processes of a `build_mesh` as weights see them; collective over the world.

    ("dp_shard_sp",), over which every weight is spread; with several copies ("dp_replicate", "dp_shard_sp").
    offload: weights and gradients lie on the host, so that its tensors must travel too.
    """
    ranks = mesh.mesh.flatten(1)
    names: tuple[str, ...] = (REPLICATE_AXIS, WEIGHTS_AXIS)
    if ranks.shape[0] == 1:
        ranks, names = ranks[0], (WEIGHTS_AXIS,)
    backend = "cpu:gloo,cuda:nccl" if offload and mesh.device_type == "cuda" else _backend(mesh.device_type)
    return _mesh(ranks, names, mesh.device_type, backend, timeout_s)


def data_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """The sequence group of this process, and the number of groups, counted over both data-parallel axes."""
    shards = mesh[SHARD_AXIS].size()
    rank = mesh.get_local_rank(REPLICATE_AXIS) * shards + mesh.get_local_rank(SHARD_AXIS)
    return rank, mesh[REPLICATE_AXIS].size() * shards


def _backend(device_type: str) -> str:
    return "nccl" if device_type == "cuda" else "gloo"


def _mesh(ranks: torch.Tensor, names: tuple[str, ...], device_type: str, backend: str, timeout_s: float) -> DeviceMesh:
    # Groups are made here, not by init_device_mesh, because that gives them the default deadline of half an hour.
    groups = []
    for axis in range(ranks.dim()):
        lines = ranks.movedim(axis, -1).reshape(-1, ranks.shape[axis]).tolist()
        groups.append(_own_group(lines, backend, timeout_s))
    if len(groups) == 1:
        return DeviceMesh.from_group(groups[0], device_type, mesh_dim_names=names)
    return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=names)


def _own_group(partition: list[list[int]], backend: str, timeout_s: float) -> dist.ProcessGroup:
    """Make the groups of a partition of the world, in the same order everywhere; return this process's own."""
    own: dist.ProcessGroup | None = None
    for ranks in partition:
        group = dist.new_group(ranks, backend=backend, timeout=timedelta(seconds=timeout_s))
        if isinstance(group, dist.ProcessGroup):  # what others are returned is a number
            own = group
    assert own is not None
    return own
