"""Process groups as those see them who are in them."""

from typing import Any

import torch.distributed as dist


def new_group(**options: Any) -> dist.ProcessGroup:
    """`dist.new_group` in a process that belongs to the group: others are returned a number in its place."""
    group = dist.new_group(**options)
    assert isinstance(group, dist.ProcessGroup)
    return group
