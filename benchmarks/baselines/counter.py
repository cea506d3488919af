"""Bytes of payload, counted where torch.distributed is called: one counter for the library and all baselines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from lasp.distributed import comm


@dataclass
class Counted:
    """Bytes that this rank sent and received: each once for every rank that gets it."""

    sent_bytes: int = 0
    received_bytes: int = 0

    def take(self) -> tuple[int, int]:
        """Sent and received since the last call."""
        taken = self.sent_bytes, self.received_bytes
        self.sent_bytes = self.received_bytes = 0
        return taken


@contextlib.contextmanager
def counting() -> Iterator[Counted]:
    """Count all calls made within, by anybody, on this rank."""
    count = Counted()

    def share(send: int, receive: int) -> None:
        count.sent_bytes += send
        count.received_bytes += receive

    def others(group: Any) -> int:
        return dist.get_world_size(group) - 1

    def gather(output: Any, tensor: Any, group: Any = None, **_: Any) -> None:
        share(tensor.nbytes * others(group), output.nbytes - tensor.nbytes)

    def reduce_scatter(output: Any, input: Any, op: Any = None, group: Any = None, **_: Any) -> None:
        share(input.nbytes - output.nbytes, output.nbytes * others(group))

    def all_to_all(
        output: Any, tensor: Any, receives: Any = None, sends: Any = None, group: Any = None, **_: Any
    ) -> None:
        rank, size = dist.get_rank(group), others(group) + 1
        kept_out = output.shape[0] // size if receives is None else receives[rank]
        kept_in = tensor.shape[0] // size if sends is None else sends[rank]
        rows = [t.nbytes // t.shape[0] if t.shape[0] else 0 for t in (tensor, output)]
        share(tensor.nbytes - kept_in * rows[0], output.nbytes - kept_out * rows[1])

    def send(tensor: Any, *_: Any, **__: Any) -> None:
        share(tensor.nbytes, 0)

    def receive(tensor: Any, *_: Any, **__: Any) -> None:
        share(0, tensor.nbytes)

    def broadcast(tensor: Any, src: Any = None, group: Any = None, group_src: Any = None, **_: Any) -> None:
        source = dist.get_group_rank(group, src) if group_src is None else group_src
        is_source = dist.get_rank(group) == source
        share(tensor.nbytes * others(group) * is_source, tensor.nbytes * (not is_source))

    counters: dict[str, Callable[..., None]] = {
        "all_gather_into_tensor": gather,
        "all_gather_single": gather,
        "reduce_scatter_tensor": reduce_scatter,
        "reduce_scatter_single": reduce_scatter,
        "all_to_all_single": all_to_all,
        "isend": send,
        "irecv": receive,
        "broadcast": broadcast,
    }
    saved: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, counter: Callable[..., None]) -> None:
        real = getattr(owner, name)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            counter(*arguments, **keywords)
            return real(*arguments, **keywords)

        saved.append((owner, name, real))
        setattr(owner, name, counted)

    try:
        for name, counter in counters.items():
            if hasattr(dist, name):  # two were renamed in PyTorch 2.13
                patch(dist, name, counter)
        for name in ("isend", "irecv"):  # a batch of messages knows its operations by identity
            saved.append((distributed_c10d, name, getattr(distributed_c10d, name)))
            setattr(distributed_c10d, name, getattr(dist, name))
        patch(comm, "_all_gather", gather)
        yield count
    finally:
        for owner, name, real in reversed(saved):
            setattr(owner, name, real)
