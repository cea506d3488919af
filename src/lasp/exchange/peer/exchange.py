"""All summaries by way of memory that the ranks of one host write into directly: an all-gather without a library.

A rank's kernel writes its summary into every other rank's memory and raises a flag there; another kernel, queued when
the state is needed, waits for the flags and folds. That is two launches a rank, and no message waits for the host or
for another stream. Kernels: `lasp.exchange.peer.kernels`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lasp.algebra import Dense, Summary, Transition
from lasp.distributed.call import Line, Messages
from lasp.distributed.comm import Comm, ExchangeError
from lasp.distributed.symmetric_memory import symmetric_memory
from lasp.exchange.base import Exchange, ExchangeResult, PendingExchange, Traffic
from lasp.exchange.cost import Model
from lasp.exchange.payload import Payload
from lasp.exchange.schedules.all_gather import AllGather, fold

if TYPE_CHECKING:
    from lasp.exchange.peer.memory import PeerMemory

SMALLEST_SLOT = 2 << 20


class _Shared:
    """A group's memory on one device: none where there cannot be, and one exchange at a time."""

    def __init__(self) -> None:
        self.memory: PeerMemory | None = None
        self.largest = 0
        self.is_possible = True
        self.in_use = False
        self._stream: torch.cuda.Stream | None = None

    def reserve(self, comm: Comm, nbytes: int, device: torch.device) -> PeerMemory | None:
        """Memory for summaries of `nbytes`, if there can be. Collective on GPUs, where that is more than before."""
        if not _is_gpu(device):
            return None
        if self.is_possible and (self.memory is None or self.largest < nbytes):
            from lasp.exchange.peer.memory import PeerMemory, bytes_needed, slot_needed

            slot = max(SMALLEST_SLOT, 1 << (slot_needed(nbytes) - 1).bit_length())
            buffers = symmetric_memory(comm, bytes_needed(comm.size, slot), device)
            self.is_possible = buffers is not None
            if buffers is not None:
                self.memory, self.largest = PeerMemory(comm.rank, buffers, slot, comm.timeout_s), slot - slot_needed(0)
                comm.alarm.ends(self.memory.end_wait)
        return self.memory if self.is_possible else None

    def follow(self, device: torch.device) -> None:
        """Put the next exchange behind the last one, if that was on another stream."""
        stream = torch.cuda.current_stream(device)
        if self._stream is not None and self._stream != stream and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self._stream)
        self._stream = stream


_shared: WeakKeyDictionary[Comm, dict[torch.device, _Shared]] = WeakKeyDictionary()


def _shared_of(comm: Comm, device: torch.device) -> _Shared:
    of_comm = _shared.get(comm)
    if of_comm is None:
        of_comm = _shared[comm] = {}
    if device not in of_comm:
        of_comm[device] = _Shared()
    return of_comm[device]


def is_possible(comm: Comm, nbytes: int, device: torch.device) -> bool:
    """True if the ranks can write summaries into each other's memory. Collective when first asked for so many bytes."""
    return _shared_of(comm, device).reserve(comm, nbytes, device) is not None


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


class PendingPeer:
    def __init__(
        self,
        shared: _Shared,
        memory: PeerMemory,
        comm: Comm,
        seal: tuple[Tensor, Tensor] | None,
        reverse: bool,
        transition: Transition,
        state: Tensor,
        stored: Tensor | None,
        initial: Tensor | None,
        want_total: bool,
    ) -> None:
        # What was pushed stays referenced: the kernel that reads it may not have run yet. So does the memory that it
        # was pushed to: an exchange begun meanwhile may have asked for more.
        self._shared, self._memory, self._comm, self._reverse = shared, memory, comm, reverse
        self._seal = seal
        self._transition, self._state, self._stored = transition, state, stored
        self._initial, self._want_total = initial, want_total

    def wait(self) -> ExchangeResult:
        memory, initial, state = self._memory, self._initial, self._state
        self._shared.in_use = False
        stored = 0 if self._stored is None else self._stored.numel()
        if isinstance(self._transition, Dense):
            own = Summary(self._transition, state)
            line = Line(self._comm, self._reverse)
            return fold(line, own, initial, memory.collect(state, stored, self._seal), self._want_total)
        initial = None if initial is None else initial.contiguous()
        options = {"reverse": self._reverse, "want_total": self._want_total}
        return ExchangeResult(*memory.fold(initial, state, stored, self._seal, **options))


class Peer(Exchange):
    """An all-gather by writes into the other GPUs' memory: GPUs of one host, over NCCL."""

    name = "peer"
    wants_own_stream = False
    accepts_zero_initial = True

    @classmethod
    def is_selectable(cls, nodes: tuple[int, ...], *, peers: bool) -> bool:
        return peers and len(nodes) == 1

    def begin(
        self, messages: Messages, summary: Summary, initial: Tensor | None, *, reverse: bool, want_total: bool
    ) -> PendingExchange:
        """`initial` is zero if None.

        Raises:
            ExchangeError: the GPUs cannot reach each other's memory.
        """
        comm = messages.check()
        state, nbytes = summary.state.contiguous(), summary.nbytes
        device = state.device
        shared = _shared_of(comm, device)
        memory = shared.reserve(comm, nbytes, device)
        if memory is None:
            raise ExchangeError(
                f'exchange "peer" takes GPUs of one host, over NCCL, that can write to each other\'s memory; those of '
                f'ranks {comm.global_ranks} cannot: use "auto"'
            )
        if shared.in_use:
            # Begun within another's wait, on every rank alike: one memory holds one exchange at a time.
            return AllGather().begin(messages, summary, initial, reverse=reverse, want_total=want_total)
        shared.follow(device)
        shared.in_use = True
        stored = next((part.contiguous() for part in summary.transition.tensors()), None)
        seal = messages.seal
        memory.push(stored, state, None if seal is None else seal[0])
        comm.count(sent=nbytes * (comm.size - 1), received=nbytes * (comm.size - 1))
        return PendingPeer(shared, memory, comm, seal, reverse, summary.transition, state, stored, initial, want_total)

    def traffic(self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool) -> Traffic:
        return AllGather().traffic(load, position, nodes, want_total=want_total)

    def seconds(self, model: Model, *, want_total: bool) -> float:
        others = model.size - 1
        folds = (others + want_total) * model.apply_summary() if model.load.is_dense else 0.0
        return model.peer(model.load.summary_bytes * others) + folds
