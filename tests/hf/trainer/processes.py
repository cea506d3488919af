"""Processes of tests as torchrun would start them, and their groups."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

import lasp


def as_process(rank: int, size: int) -> None:
    """Set what torchrun would say."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")


def groups_of(split: int) -> lasp.SequenceParallel:
    """This process's group of so many consecutive ones. Collective."""
    size, rank = dist.get_world_size(), dist.get_rank()
    members: list[Any] = [dist.new_group(list(range(first, first + split))) for first in range(0, size, split)]
    return lasp.SequenceParallel(members[rank // split])
