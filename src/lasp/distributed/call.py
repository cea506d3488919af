"""What the ranks of a group do together, under a number that they have told each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lasp.distributed.record import Record

if TYPE_CHECKING:
    from lasp.distributed.comm import Comm, Pending


@dataclass
class Posted:
    """Records under way: what to wait for, where they come, and whether this rank has heard them."""

    work: Any
    everything: Tensor
    what: str
    heard: bool = False


class Call:
    """What one rank does together with the others, under a number: messages with the verbs of `Comm`.

    The ranks have told each other which call it is. Before anything of it is sent they are heard, so a rank that came
    to another call sends nothing into this one.
    """

    def __init__(self, comm: Comm, record: Record, posted: Posted | None) -> None:
        self.comm, self.record, self._posted = comm, record, posted

    @property
    def number(self) -> int:
        return self.record.number

    def adjoint(self, part: str = "backward") -> Call:
        """Begin the call that takes this one's gradients."""
        record = self.record
        return self.comm.call(record.description.of(part), record.documents, forward=record.number)

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
        """On a device what messages are sealed with: a header, and where to write it and another that was met."""
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
