"""Checks, before weights are saved, that their copies are still copies.

Processes that hold the same tensor step it by the same gradient, so it stays the same to the bit. Where it does not
(memory that flipped a bit, a kernel that is not deterministic, a process with other settings), a checkpoint would mix
the copies, and no later step would repair it.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lasp.errors import ReplicaError
from lasp.train.checkpoint.shards import optimizer_state
from lasp.train.world import World

_KINDS = ("weight", "step", "exp_avg", "exp_avg_sq")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(step: int, module: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Compare what processes hold of the same weights and optimizer state; collective.

    Sharded weights are compared over their copies. Raises ReplicaError, the same on every process.
    """
    if world.control is None:
        return
    parameters, states = dict(module.named_parameters()), optimizer_state(module, optimizer)
    held: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for kind, tensor in {"weight": parameter.detach(), **states.get(name, {})}.items():
            held[f"{kind} of {name}"] = tensor
    names = [f"{kind} of {name}" for name in parameters for kind in _KINDS]
    device = world.device
    # Of each whether it is held, and its bits.
    digests = torch.zeros(len(names), 2, dtype=torch.int64, device=device)
    present = [number for number, name in enumerate(names) if name in held]
    digests[present, 0] = 1
    digests[present, 1] = torch.stack([digest(held[names[number]]).to(device) for number in present])
    places = [float(_place(parameters.values()))]
    everywhere = world.control.all_gather(digests.flatten().cpu()).wait().view(world.size, len(names), 2)
    by_place: dict[float, list[int]] = {}
    for rank, (place,) in enumerate(world.gather(places)):
        by_place.setdefault(place, []).append(rank)
    problems = []
    for ranks in by_place.values():
        here = everywhere[ranks]
        first = here[here[..., 0].argmax(0), torch.arange(len(names)), 1]  # of the first that holds it
        differs = ((here[..., 1] != first) & (here[..., 0] == 1)).any(0)
        problems += [(number, ranks) for number in differs.nonzero()[:, 0].tolist()]
    if problems:
        number, ranks = min(problems)
        bits = {rank: int(everywhere[rank, number, 1]) for rank in ranks if everywhere[rank, number, 0]}
        count = len({number for number, _ in problems})
        raise ReplicaError(
            f"after step {step} the copies of the weights differ: {names[number]} on {_odd(bits)}"
            + (f", and {count - 1} other tensors" if count > 1 else "")
            + ". Nothing of it was saved, and the last checkpoint is good: go on from it with --resume. If it happens "
            "again on the same machine, suspect its memory"
        )


def digest(tensor: Tensor) -> Tensor:
    """The sum of the tensor's bits as integers: int64, on its device. Any single bit that differs changes it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().contiguous().view(_INTEGERS[local.element_size()]).sum(dtype=torch.int64)


def _place(parameters: object) -> int:
    """Number of the share of the weights that this process holds; processes with one number hold the same."""
    for parameter in parameters:  # type: ignore[attr-defined]
        if isinstance(parameter, DTensor):
            place, mesh = 0, parameter.device_mesh
            for axis, placement in enumerate(parameter.placements):
                if isinstance(placement, Shard):
                    place = place * mesh.size(axis) + mesh.get_local_rank(axis)
            return place
    return 0


def _odd(bits: dict[int, int]) -> str:
    """Name the ranks that differ from the others."""
    (usual, most), *others = Counter(bits.values()).most_common()
    if most == max(count for _, count in others):
        groups = [[rank for rank, value in bits.items() if value == each] for each in dict.fromkeys(bits.values())]
        return "ranks " + " and ".join(" ".join(map(str, ranks)) for ranks in groups)
    odd = [str(rank) for rank, value in bits.items() if value != usual]
    return f"rank{'s' if len(odd) > 1 else ''} {', '.join(odd)} ({most} other processes agree)"
