"""The end of a process that has groups of gloo's.

A thread of gloo's that has finished an operation gives back its tensors, and each has a Python object: it needs the
interpreter's lock. If the interpreter begins to end before the thread has it, Python 3.11 ends the thread in the
middle of a destructor, and with it the process: SIGABRT, after all results. So before that groups are ended, which
waits for their threads.
"""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist


def before_exit(owner: Any, groups: Sequence[dist.ProcessGroup], leave: Callable[[], None]) -> None:
    """Call `leave`, then end `groups` and their threads, when the interpreter ends but before it is too late.

    owner: what holds the groups; its `forget_groups` lets go of them. Neither is kept alive.
    """
    atexit.register(_end, weakref.ref(owner), [weakref.ref(group) for group in groups], leave)


def _end(owner: weakref.ref[Any], groups: list[weakref.ref[Any]], leave: Callable[[], None]) -> None:
    leave()
    for found in groups:
        group = found()
        if group is not None:
            with contextlib.suppress(ValueError, AssertionError):  # the program has ended it, or all of them
                dist.destroy_process_group(group)
        del group
    if (holder := owner()) is not None:
        holder.forget_groups()
