"""Joins the processes that a launcher started (`lasp`, torchrun, Slurm) into one group, in one way for every command.

They are told by RANK and WORLD_SIZE who they are and by LOCAL_WORLD_SIZE how many share their machine; where they meet
is LASP_RENDEZVOUS, if `lasp` started them, else torchrun's variables say it.
"""

import os
import socket
from collections.abc import MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lasp.distributed.signals import end_with_parent

RENDEZVOUS = "LASP_RENDEZVOUS"


def meet(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store in which the processes tell each other their addresses. They end with their launcher, and on one
    machine none can be reached from another.

    torchrun keeps one store for all its tries, with the addresses of a try that failed still in it. The number of the
    try tells them apart: on one machine, and over several with the static rendezvous, where every agent starts again
    when a process is lost anywhere. With c10d's the agents count differently, and each try needs a store of its own
    (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).
    """
    end_with_parent()  # whatever the launcher is: a rank that outlives it would hold the run's lock
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    if one_machine:
        stay_on_loopback(os.environ)
    store, _, _ = next(rendezvous(os.environ.get(RENDEZVOUS, "env://"), rank, size, timeout=timeout))
    counted = one_machine or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if counted else "0"
    return dist.PrefixStore(f"lasp-{attempt}", store)


def start(device: torch.device, timeout_s: float) -> None:
    """Make the default group of the launched processes. device: of this one; an NCCL group if it has a GPU of its own.

    timeout_s: after which a collective gives up.
    """
    rank, size, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=timeout_s)
    make(device, meet(rank, size, timeout), rank, size, timeout)


def make(device: torch.device, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
    """The default group of processes that have met at `store`."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def stay_on_loopback(environment: MutableMapping[str, str]) -> None:
    """Have gloo listen on the loopback interface alone, unless `environment` names an interface already."""
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if loopback:
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())
