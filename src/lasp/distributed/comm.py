"""Communication within one sequence-parallel group: the only caller of collectives.

Ranks here are ranks within the group. Every operation is counted, has a deadline, and fails with an
`ExchangeError` that says which rank was waiting for what.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.distributed.clock import ExchangeClock
from lasp.distributed.groups import new_group

# Renamed in PyTorch 2.13; the old name warns there and the new one is missing before.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_RECORD_BYTES = 2048
_Result = TypeVar("_Result")


class ExchangeError(RuntimeError):
    """Communication between the ranks of a group failed, or the ranks disagree about what to do."""


@dataclass
class Counters:
    """What this rank sent and received: bytes of payload, once for every rank that gets them."""

    sent_bytes: int = 0
    received_bytes: int = 0
    messages: int = 0

    def add(self, *, sent: int = 0, received: int = 0) -> None:
        self.sent_bytes += sent
        self.received_bytes += received
        self.messages += 1

    def reset(self) -> None:
        self.sent_bytes = self.received_bytes = self.messages = 0


class Pending(Generic[_Result]):
    """An operation under way; `wait` gives its result."""

    def __init__(self, comm: Comm, work: Any, what: str, result: Callable[[], _Result]) -> None:
        self._comm, self._work, self._what, self._result = comm, work, what, result
        if comm.clock is not None:
            comm.clock.begun()

    def wait(self) -> _Result:
        with self._comm.waiting(self._what, messages=1):
            self._work.wait()
        return self._result()


class _Explained:
    """Turns a backend's failure into an ExchangeError that says who waited for what."""

    def __init__(self, comm: Comm, what: str) -> None:
        self._comm, self._what = comm, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, ExchangeError):
            return
        c = self._comm
        raise ExchangeError(
            f"sequence-parallel rank {c.rank} of {c.size} (global rank {dist.get_rank()}) failed to {self._what}, "
            f"operation {c.operations}, deadline {c.timeout_s:g} s. Another rank stopped, is late, or runs "
            f"something else: look for the first error among global ranks {c.global_ranks}. Cause: {error}"
        ) from error


class _Waiting(_Explained):
    """Also adds the time spent inside to the clock, as waiting for so many messages that have begun."""

    def __init__(self, comm: Comm, what: str, messages: int) -> None:
        super().__init__(comm, what)
        self._messages = messages

    def __enter__(self) -> None:
        if self._comm.clock is not None:
            self._comm.clock.wait_begins()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._comm.clock is not None:
            self._comm.clock.wait_ends(self._messages)
        super().__exit__(kind, error, trace)


class Comm:
    """Point-to-point and collective operations within one group.

    Args:
        group: the ranks. Its operations are not used for the exchange when it is gloo's: this object makes
            groups of its own, with the deadline and free of other traffic. All ranks of the group must construct it.
        timeout_s: seconds after which a wait raises.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.global_ranks = dist.get_process_group_ranks(group)
        self.counters = Counters()
        self.clock: ExchangeClock | None = None
        self.operations = 0
        self.backend: str = dist.get_backend(group)
        self._sending: deque[tuple[Any, Tensor]] = deque()
        self._nodes: tuple[int, ...] | None = (1,) if self.size == 1 else None
        if self.size == 1:
            self._group = group
            return
        options: dict[str, Any] = {
            "ranks": self.global_ranks,
            "timeout": timedelta(seconds=timeout_s),
            "use_local_synchronization": True,
        }
        self._control = new_group(backend="gloo", **options)
        uses_gloo = self.backend == "gloo"
        self._group = new_group(backend="gloo", **options) if uses_gloo else group
        # A process that ends takes its unsent messages with it, and a chain's first rank is done long before its last.
        atexit.register(_let_messages_leave, self._sending)
        # gloo cannot send CUDA tensors from one process to another: they pass through the host.
        self._through_host = uses_gloo

    def explained(self, what: str) -> _Explained:
        return _Explained(self, what)

    def waiting(self, what: str, *, messages: int = 0) -> _Waiting:
        """Around whatever blocks; messages: how many that have begun come with it."""
        return _Waiting(self, what, messages)

    def start_clock(self) -> ExchangeClock:
        """Measure from now on, until `clock` is set to None or started anew."""
        self.clock = ExchangeClock(on_device=self.backend == "nccl")
        return self.clock

    @property
    def nodes(self) -> tuple[int, ...]:
        """How many consecutive ranks share a host, host after host. Collective when first asked for."""
        if self._nodes is None:
            own = torch.frombuffer(bytearray(hashlib.sha256(_host().encode()).digest()), dtype=torch.uint8)
            with self.explained("learn which ranks share a host"):
                hosts = self._from_hosts(own)
            self._nodes = tuple(len(list(ranks)) for _, ranks in groupby(bytes(host.tolist()) for host in hosts))
        return self._nodes

    @property
    def group(self) -> dist.ProcessGroup:
        """The group whose operations carry tensors."""
        return self._group

    def gathered(self, number: int) -> list[int]:
        """Every rank's number, by way of the hosts."""
        if self.size == 1:
            return [number]
        with self.explained("compare a number with the other ranks"):
            return [int(each) for each in self._from_hosts(torch.tensor([number]))]

    def everywhere(self, condition: bool) -> bool:
        """Whether it holds on every rank."""
        return all(self.gathered(int(condition)))

    def all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        """Start gathering every rank's `tensor` [n]; the result is [size, n]."""
        gathered = tensor.new_empty(self.size, tensor.numel())
        self.count(sent=tensor.nbytes * (self.size - 1), received=tensor.nbytes * (self.size - 1))
        with self.explained("start an all-gather"):
            work = _all_gather(gathered.view(-1), tensor, group=self._group, async_op=True)
        return Pending(self, work, "finish an all-gather", lambda: gathered)

    def send(self, tensor: Tensor, to: int) -> None:
        """Start sending `tensor`; it is kept alive, and must not change, until it has left."""
        self._reap()
        self.count(sent=tensor.nbytes)
        payload = tensor.detach().contiguous()
        payload = payload.cpu() if self._through_host else payload
        with self.explained(f"send a state to rank {to}"):
            self._sending.append((dist.isend(payload, group=self._group, group_dst=to), payload))

    def flush(self) -> None:
        """Wait until all that was sent has left: over NCCL the stream waits, and a capture joins NCCL's."""
        while self._sending:
            self._await_oldest()

    def settle(self) -> None:
        """At the end of an exchange: over NCCL, let the stream wait until what was sent has left.

        What sends is a kernel. Sweeps queued before it has begun take every multiprocessor for as long as they run, and
        the next rank of a chain waits for them too.
        """
        if self.backend == "nccl":
            self.flush()

    def abandon(self) -> None:
        """Forget what was sent, as after a capture that failed: nothing waits on the events of a graph that is not."""
        self._sending.clear()

    def receive(self, like: Tensor, source: int) -> Pending[Tensor]:
        """Start receiving a tensor shaped as `like` from rank `source`."""
        self.count(received=like.nbytes)
        buffer = self._buffer(like)
        with self.explained(f"receive a state from rank {source}"):
            work = dist.irecv(buffer, group=self._group, group_src=source)
        return Pending(self, work, f"receive a state from rank {source}", lambda: buffer.to(like.device))

    def trade(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> list[Pending[Tensor]]:
        """Start several messages at once, as `send` and `receive` do one: no order among them can block.

        Args:
            sends: tensors and the ranks they go to.
            receives: tensors of the shapes that come, and the ranks they come from.

        Returns:
            what comes, in the order of `receives`.
        """
        if self._through_host:  # gloo: messages are independent of each other as it is
            pending = [self.receive(like, source) for like, source in receives]
            for tensor, to in sends:
                self.send(tensor, to)
            return pending
        if not sends and not receives:
            return []
        self._reap()
        outgoing = [tensor.detach().contiguous() for tensor, _ in sends]
        buffers = [self._buffer(like) for like, _ in receives]
        operations = [
            dist.P2POp(dist.isend, tensor, group=self._group, group_peer=to)
            for tensor, (_, to) in zip(outgoing, sends, strict=True)
        ]
        operations += [
            dist.P2POp(dist.irecv, buffer, group=self._group, group_peer=source)
            for buffer, (_, source) in zip(buffers, receives, strict=True)
        ]
        for tensor in outgoing:
            self.count(sent=tensor.nbytes)
        for buffer in buffers:
            self.count(received=buffer.nbytes)
        peers = sorted({peer for _, peer in (*sends, *receives)})
        what = f"exchange states with ranks {peers}"
        with self.explained(what):
            works = _Works(dist.batch_isend_irecv(operations))
        self._sending.extend((works, tensor) for tensor in outgoing)
        return [Pending(self, works, what, lambda buffer=buffer: buffer) for buffer in buffers]  # type: ignore[misc]

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Pending[list[Tensor]]:
        """Start sending `parts[r]` to rank r, for all r; the results are flat, `sizes[r]` numbers from rank r.

        What a rank sends to itself comes back as it is.
        """
        rank = self.rank
        outgoing = torch.cat([part.detach().reshape(-1) for r, part in enumerate(parts) if r != rank])
        counts = [0 if r == rank else part.numel() for r, part in enumerate(parts)]
        expected = [0 if r == rank else n for r, n in enumerate(sizes)]
        incoming = outgoing.new_empty(sum(expected))
        self.count(sent=outgoing.nbytes, received=incoming.nbytes)
        with self.explained("start an all-to-all"):
            work = dist.all_to_all_single(incoming, outgoing, expected, counts, group=self._group, async_op=True)

        def split() -> list[Tensor]:
            received = list(incoming.split(expected))
            received[rank] = parts[rank].detach().reshape(-1)
            return received

        return Pending(self, work, "finish an all-to-all", split)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """`tensor` of rank `source`, on every rank; elsewhere it gives only the shape."""
        if self.size == 1:
            return tensor
        tensor = tensor.detach().contiguous() if self.rank == source else torch.empty_like(tensor).contiguous()
        share = {"sent": tensor.nbytes * (self.size - 1)} if self.rank == source else {"received": tensor.nbytes}
        self.count(**share)
        with self.waiting(f"broadcast from rank {source}"):
            dist.broadcast(tensor, group=self._group, group_src=source)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, added in rank order so that it does not depend on the network."""
        if self.size == 1:
            return tensor
        shares = self.all_gather(tensor.contiguous().view(-1)).wait()
        total = shares[0]
        for share in shares[1:]:
            total = total + share
        return total.view(tensor.shape)

    def agree(self, description: Mapping[str, object]) -> None:
        """Raise the same ExchangeError on every rank unless all ranks give the same description.

        Runs on the host, on a group of its own, so that a rank which does not come is a timeout here and never a
        wrong number there. A key "error" reports a failure of one rank to all.
        """
        if self.size == 1:
            return
        text = json.dumps(description, default=str)
        record = (hashlib.sha256(text.encode()).hexdigest()[:16] + text).encode()[:_RECORD_BYTES]
        buffer = torch.zeros(_RECORD_BYTES, dtype=torch.uint8)
        buffer[: len(record)] = torch.frombuffer(bytearray(record), dtype=torch.uint8)
        with self.waiting("agree with the other ranks on what to compute"):
            gathered = self._from_hosts(buffer)
        records = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in gathered]
        if len(set(records)) > 1 or "error" in description:
            raise ExchangeError(_disagreement(records))

    def _buffer(self, like: Tensor) -> Tensor:
        device = "cpu" if self._through_host else like.device
        return torch.empty_like(like, device=device, memory_format=torch.contiguous_format)

    def count(self, **share: int) -> None:
        """Add one operation with bytes `sent` and `received`."""
        self.operations += 1
        self.counters.add(**share)

    def _reap(self) -> None:
        """Let go of what has left; wait for the oldest where too much is still under way.

        NCCL is not asked, which a capture does not allow: waiting for it costs the host nothing.
        """
        asks = self.backend != "nccl"
        while self._sending and (len(self._sending) > 8 or (asks and self._sending[0][0].is_completed())):
            self._await_oldest()

    def _await_oldest(self) -> None:
        work, _ = self._sending.popleft()
        with self.waiting("finish sending a state"):
            work.wait()

    def _from_hosts(self, own: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape on the host, by the group that carries nothing else."""
        everywhere = [torch.empty_like(own) for _ in range(self.size)]
        self.operations += 1
        dist.all_gather(everywhere, own, group=self._control)
        return everywhere


class _Works:
    """Several handles as one. Each is waited for once: gloo's would wait for another message the second time."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = list(works)

    def wait(self) -> None:
        while self._works:
            self._works.pop().wait()

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def _let_messages_leave(sending: deque[tuple[Any, Tensor]]) -> None:
    while sending:
        with contextlib.suppress(RuntimeError):  # the receiver is gone, or the group is
            sending.popleft()[0].wait()


def _host() -> str:
    """A name of this host that no other host has, the same in all its containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.exists() else socket.gethostname()


def _disagreement(records: list[str]) -> str:
    """What differs between the ranks, one line a field."""
    try:
        descriptions = [json.loads(record[16:]) for record in records]
    except json.JSONDecodeError:
        return "the ranks disagree about what to compute:\n" + "\n".join(
            f"  rank {rank}: {record[16:]}" for rank, record in enumerate(records)
        )
    errors = [f"  rank {rank}: {d['error']}" for rank, d in enumerate(descriptions) if "error" in d]
    if errors:
        return "invalid input to a sequence-parallel operation:\n" + "\n".join(errors)
    lines = []
    for key in dict.fromkeys(key for d in descriptions for key in d):
        values = [d.get(key) for d in descriptions]
        if any(value != values[0] for value in values):
            lines.append(f"  {key}: " + ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values)))
    return "the ranks disagree about what to compute; nothing was exchanged:\n" + "\n".join(lines)
