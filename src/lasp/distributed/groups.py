"""Process groups: as those see them who are in them, and made beside others."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


def new_group(**options: Any) -> dist.ProcessGroup:
    """`dist.new_group` in a process that belongs to the group: others are returned a number in its place."""
    group = dist.new_group(**options)
    assert isinstance(group, dist.ProcessGroup)
    return group


def gloo_group(beside: dist.ProcessGroup, name: str, timeout: timedelta) -> dist.ProcessGroup:
    """A group of the same ranks over gloo, with a deadline of its own. Collective over the group given, and no other.

    Its ranks meet under the name. `dist.new_group` takes one from how many groups a process has, which need not be as
    many on every rank: some may be in others too.
    """
    size, rank, ranks = dist.get_world_size(beside), dist.get_rank(beside), dist.get_process_group_ranks(beside)
    # What new_group does, but for the name and for meeting all other processes of the world.
    group, _ = distributed_c10d._new_process_group_helper(
        size, rank, ranks, dist.Backend("gloo"), distributed_c10d._get_default_store(),
        name, timeout=timeout,  # type: ignore[arg-type]
    )  # fmt: skip
    assert isinstance(group, dist.ProcessGroup)
    distributed_c10d._world.pg_group_ranks[group] = {each: place for place, each in enumerate(ranks)}
    return group


def shared_store(name: str) -> dist.Store:
    """The store in which all processes of the world met, with keys that begin with `name`."""
    return dist.PrefixStore(name, distributed_c10d._get_default_store())
