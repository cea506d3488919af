"""LASP's exchange (arXiv 2404.02882): the state goes from rank to rank, each applying its own summary.

Least volume, one state per rank and direction whatever the transition, and a chain of size - 1 messages. Unlike in
the authors' code a rank receives only when it waits, so the ranks' local work is not serialised.
"""

from __future__ import annotations

from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.comm import Comm
from lasp.distributed.comm import Pending as Message
from lasp.exchange.base import Carried, Traffic


class _Pending:
    def __init__(
        self,
        comm: Comm,
        summary: Summary,
        initial: Tensor,
        message: Message | None,
        step: int,
        want_total: bool,
    ) -> None:
        self._comm, self._summary, self._initial = comm, summary, initial
        self._message, self._step, self._want_total = message, step, want_total

    def wait(self) -> Carried:
        comm, last = self._comm, self._comm.size - 1 if self._step > 0 else 0
        entering = self._initial if self._message is None else self._message.wait()
        if comm.rank == last:
            leaving = self._summary.apply(entering) if self._want_total else entering
        else:
            leaving = self._summary.apply(entering)
            comm.send(leaving, comm.rank + self._step)
        return Carried(entering, comm.broadcast(leaving, last) if self._want_total else None)


class Ring:
    """Point-to-point, neighbour to neighbour."""

    name = "ring"

    def begin(self, comm: Comm, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool) -> _Pending:
        step, first = (-1, comm.size - 1) if reverse else (1, 0)
        message = None if comm.rank == first else comm.receive(summary.state, comm.rank - step)
        return _Pending(comm, summary, initial, message, step, want_total)

    def traffic(self, state_bytes: int, summary_bytes: int, rank: int, size: int, *, want_total: bool) -> Traffic:
        last = rank == size - 1
        sent = 0 if last else state_bytes
        received = 0 if rank == 0 else state_bytes
        if want_total:
            sent, received = sent + last * state_bytes * (size - 1), received + (not last) * state_bytes
        return Traffic(sent, received)
