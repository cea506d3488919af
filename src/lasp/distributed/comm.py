"""Communication within one sequence-parallel group: the only caller of collectives.

Ranks here are ranks within the group. Every operation is counted, has a deadline, and fails with an
`ExchangeError` that says which rank was waiting for what.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import socket
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.distributed.alarm import Alarm, NoAlarm
from lasp.distributed.clock import ExchangeClock
from lasp.distributed.ending import before_exit
from lasp.distributed.groups import gloo_group, shared_store
from lasp.distributed.record import Description, ExchangeError, Record, RecordedStep, compare, failures, number_given

# Renamed in PyTorch 2.13; the old name warns there and the new one is missing before.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_gather_records = _all_gather
# How long a process that ends waits for the others to hear that it failed.
_LAST_WORDS = timedelta(seconds=5)
_Result = TypeVar("_Result")


@dataclass
class Posted:
    """Records under way: what to wait for, where they come, and whether this rank has heard them."""

    work: Any
    everything: Tensor
    what: str
    heard: bool = False


@dataclass
class Counters:
    """Counts of this rank's messages: bytes of payload sent and received, once for every rank that gets them.

    Headers, which tell the ranks which call a payload belongs to, are not counted there but in `header_bytes`.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    messages: int = 0
    header_bytes: int = 0

    def exempt(self, extra: int, *, sent: int = 0, received: int = 0) -> None:
        """Count `extra` bytes of each of so many messages as headers."""
        self.sent_bytes -= sent * extra
        self.received_bytes -= received * extra
        self.header_bytes += sent * extra

    def add(self, *, sent: int = 0, received: int = 0) -> None:
        self.sent_bytes += sent
        self.received_bytes += received
        self.messages += 1

    def reset(self) -> None:
        self.sent_bytes = self.received_bytes = self.messages = self.header_bytes = 0


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

    def then(self, change: Callable[[_Result], _Result]) -> Pending[_Result]:
        """The same, whose result is what `change` makes of it."""
        result = self._result
        self._result = lambda: change(result())
        return self


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
        c.alarm.check()
        raise c.alarm.raised(
            f"sequence-parallel rank {c.rank} of {c.size} (global rank {dist.get_rank()}) failed to {self._what}, "
            f"operation {c.operations}, deadline {c.timeout_s:g} s. Another rank stopped, is late, or runs "
            f"something else: look for the first error among global ranks {c.global_ranks}. Cause: {error}"
        ) from error


class _Waiting(_Explained):
    """Adds the time spent inside to the clock, as waiting for so many messages that have begun."""

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
        self.step = RecordedStep()
        """Where the program says it is."""
        self.num_calls = 0
        """What the ranks have told each other of so far."""
        self._sending: deque[tuple[Any, Tensor]] = deque()
        self._unheard: deque[Posted] = deque()
        self._reports: deque[Any] = deque()
        self._nodes: tuple[int, ...] | None = (1,) if self.size == 1 else None
        self.alarm = NoAlarm()
        """Tells other ranks that this one cannot go on, and hears it of them, where a GPU keeps hosts waiting."""
        if self.size == 1:
            self._group = group
            return
        uses_gloo, deadline = self.backend == "gloo", timedelta(seconds=timeout_s)
        with self.explained("make groups of its own"):
            self._control = gloo_group(group, _agreed_name(group, deadline), deadline)
            self._group = gloo_group(group, _agreed_name(group, deadline), deadline) if uses_gloo else group
            if not uses_gloo:
                store = shared_store(_agreed_name(group, deadline))
                self.alarm = alarm = Alarm(store, self.rank, self.size, partial(_abort, weakref.ref(group)))
                weakref.finalize(self, alarm.silence)
        own = [self._control, self._group] if uses_gloo else [self._control]
        # A process that ends takes its unsent messages with it, and a chain's first rank is done long before its last.
        before_exit(self, own, partial(_let_messages_leave, self._sending, self._reports, self.alarm))
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
        """Number of consecutive ranks that share a host, host after host. Collective when first asked for."""
        if self._nodes is None:
            name = int.from_bytes(hashlib.sha256(_host().encode()).digest()[:8], "little", signed=True)
            hosts = self._gathered(name, _SHARED_HOSTS)
            self._nodes = tuple(len(list(ranks)) for _, ranks in groupby(hosts))
        return self._nodes

    @property
    def comm(self) -> Comm:
        """Itself: messages that belong to no call. A schedule takes these or a call's."""
        return self

    def check(self) -> Comm:
        """Give the communicator, as a call does: nothing was told that would have to be heard."""
        return self

    @property
    def seal(self) -> tuple[Tensor, Tensor] | None:
        return None

    @property
    def group(self) -> dist.ProcessGroup:
        """The group whose operations carry tensors."""
        return self._group

    def gathered(self, number: int) -> list[int]:
        """Every rank's number, by way of the hosts."""
        return [number] if self.size == 1 else self._gathered(number, _COMPARED)

    def everywhere(self, condition: bool) -> bool:
        """True if the condition holds on every rank."""
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

    def wait_for_sends(self) -> None:
        """Let the stream wait, at the end of an exchange over NCCL, until what was sent has left.

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

    def batch_send_recv(
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

    def compare(self, description: Description) -> None:
        """Compare a description with the other ranks, by way of the hosts.

        Raises:
            ExchangeError: the same on every rank: they differ, or one has failed.
        """
        self._gathered(0, description)

    def failed(self, error: str) -> ExchangeError:
        """Tell the other ranks, wherever they wait for this one, that it has failed, and do not wait for them.

        Returns:
            what they raise, to be raised here.
        """
        if self.size > 1:
            self.num_calls += 1
            while self._reports and self._reports[0].is_completed():
                self._reports.popleft()
            # This rank knows: it does not hear of itself.
            record = Record(self.num_calls, Description("error", {"error": error[:1000]}), step=self.step, error=True)
            self._reports.append(self._post(record).work)
        return self.alarm.raised(failures({self.rank: error[:1000]}), unless_all=True)

    def hear(self, posted: Posted) -> None:
        """Wait for the records of all ranks that belong to `posted`, and before that for those that came earlier.

        Raises:
            ExchangeError: the same on every rank: they tell of different things, or one has failed.
        """
        while not posted.heard:
            first = self._unheard.popleft()
            first.heard = True
            with self.waiting(f"agree with the other ranks on {first.what}"):
                first.work.wait()
            compare(first.everything)

    def announce(self, record: Record) -> Posted:
        """Start to tell the other ranks; `hear` waits for what they tell."""
        posted = self._post(record)
        self._unheard.append(posted)
        return posted

    def _post(self, record: Record) -> Posted:
        """Start to tell the other ranks."""
        own, what = record.written(), record.description.operator
        everything = own.new_empty(self.size * own.numel())
        self.operations += 1
        with self.explained(f"tell the other ranks of {what}"):
            return Posted(_gather_records(everything, own, group=self._control, async_op=True), everything, what)

    def _gathered(self, number: int, purpose: Description) -> list[int]:
        self.num_calls += 1
        posted = self.announce(Record(self.num_calls, purpose, step=self.step, given=number))
        self.hear(posted)
        return [number_given(own) for own in posted.everything.chunk(self.size)]

    def forget_groups(self) -> None:
        """Let go of the groups, at the process's end."""
        self._control = self._group = None  # type: ignore[assignment]

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


class _Works:
    """Several handles as one. Each is waited for once: gloo's would wait for another message the second time."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = list(works)

    def wait(self) -> None:
        while self._works:
            self._works.pop().wait()

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def _agreed_name(group: dist.ProcessGroup, timeout: timedelta) -> str:
    """A name for a group beside this one, drawn by its first rank. Collective over this group, and no other."""
    on_gpu = dist.get_backend(group) == "nccl"
    device = (getattr(group, "bound_device_id", None) or "cuda") if on_gpu else "cpu"
    drawn = torch.tensor(secrets.randbits(63), device=device)
    telling = dist.broadcast(drawn, group=group, group_src=0, async_op=True)
    assert telling is not None
    telling.wait(timeout)
    return f"lasp-{int(drawn):016x}"


def _abort(group: weakref.ref[dist.ProcessGroup]) -> None:
    if (alive := group()) is not None:
        alive.abort()


def _let_messages_leave(sending: deque[tuple[Any, Tensor]], reports: deque[Any], alarm: NoAlarm) -> None:
    alarm.stop()
    while sending:
        with contextlib.suppress(RuntimeError):  # the receiver is gone, or the group is
            sending.popleft()[0].wait()
    while reports:
        with contextlib.suppress(RuntimeError):
            reports.popleft().wait(_LAST_WORDS)


def _host() -> str:
    """A name of this host that no other host has, the same in all its containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.exists() else socket.gethostname()


_COMPARED = Description("a number compared with the other ranks", {})
_SHARED_HOSTS = Description("which ranks share a host", {})
