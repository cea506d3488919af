"""Calls: work that the ranks of a group do together, under a number that they have told each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lasp.distributed.comm import Comm, Pending, Posted
from lasp.distributed.record import Description, Record


class Calls:
    """Begins what the ranks of a group do together.

    Args:
        comm: the ranks.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def begin(
        self,
        description: Description,
        documents: str | None = None,
        *,
        forward: Call | None = None,
        sources: Sequence[int] = (),
    ) -> Call:
        """Begin a call. What it sends and receives is then part of that, and of nothing else.

        Args:
            description: of the operator, its pass and its plan.
            documents: what stands for the packed documents.
            forward: of a backward pass, the call whose gradients it takes.
            sources: what stands for the tensors that the shards come from (`lasp.distributed.record.source_of`).
        """
        comm = self.comm
        comm.num_calls += 1
        of = 0 if forward is None else forward.number
        record = Record(comm.num_calls, description, documents, of, comm.step, sources)
        return Call(self, record, comm.announce(record))


class Call:
    """One rank's side of work done together, under a number: messages with the verbs of `Comm`.

    The ranks have told each other which call it is. Before anything of it is sent they are heard, so a rank that came
    to another call sends nothing into this one.
    """

    def __init__(self, calls: Calls, record: Record, posted: Posted | None) -> None:
        self.calls, self.comm, self.record, self._posted = calls, calls.comm, record, posted

    @property
    def number(self) -> int:
        return self.record.number

    def adjoint(self, part: str = "backward") -> Call:
        """Begin the call that takes this one's gradients."""
        record = self.record
        return self.calls.begin(record.description.of(part), record.documents, forward=self)

    def check(self) -> Comm:
        """Hear the other ranks, the first time; what then carries the messages.

        Raises:
            ExchangeError: the same on every rank: they are at different calls, or one has failed.
        """
        if self._posted is not None:
            self.comm.hear(self._posted)
        return self.comm

    @property
    def seal(self) -> tuple[Tensor, Tensor] | None:
        """A header to seal messages with on a device, and where to write it and another that was met; else None."""
        return None

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    @property
    def nodes(self) -> tuple[int, ...]:
        return self.comm.nodes

    @property
    def backend(self) -> str:
        return self.comm.backend

    def all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        return self.check().all_gather(tensor)

    def send(self, tensor: Tensor, to: int) -> None:
        self.check().send(tensor, to)

    def receive(self, like: Tensor, source: int) -> Pending[Tensor]:
        return self.check().receive(like, source)

    def batch_send_recv(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> list[Pending[Tensor]]:
        return self.check().batch_send_recv(sends, receives)

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Pending[list[Tensor]]:
        return self.check().all_to_all(parts, sizes)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return self.check().broadcast(tensor, source)

    def sum(self, tensor: Tensor) -> Tensor:
        return self.check().sum(tensor)

    def wait_for_sends(self) -> None:
        self.comm.wait_for_sends()


Messages = Comm | Call
"""What carries the messages of an exchange: those of a call, or, where times are measured, of none."""


class Line(NamedTuple):
    """The ranks in the order in which the state passes them. A position is a place in that order."""

    comm: Messages
    reverse: bool

    @property
    def size(self) -> int:
        return self.comm.size

    @property
    def position(self) -> int:
        """This rank's position in the line."""
        return self.rank(self.comm.rank)

    def rank(self, position: int) -> int:
        """The rank at a position, and the position of a rank."""
        return self.comm.size - 1 - position if self.reverse else position
