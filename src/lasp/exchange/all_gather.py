"""LASP-2's exchange (arXiv 2502.07563): every rank gathers all summaries and folds those before it.

One collective, whose time does not chain over ranks; each rank receives size - 1 summaries. Transitions travel too
(nothing, one number, or K numbers a head; K x K for delta rules). The paper writes only the decay-free prefix sum;
the fold here is the general one.
"""

from __future__ import annotations

from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.comm import Comm
from lasp.distributed.comm import Pending as Gathering
from lasp.exchange.base import Carried, Traffic


class _Pending:
    def __init__(
        self,
        comm: Comm,
        summary: Summary,
        initial: Tensor,
        gathering: Gathering,
        reverse: bool,
        want_total: bool,
    ) -> None:
        self._comm, self._summary, self._initial = comm, summary, initial
        self._gathering, self._reverse, self._want_total = gathering, reverse, want_total

    def wait(self) -> Carried:
        gathered = self._gathering.wait()
        size, rank = self._comm.size, self._comm.rank
        state, entering = self._initial, self._initial
        for index in reversed(range(size)) if self._reverse else range(size):
            if index == rank:
                entering = state
                if not self._want_total:
                    break
            state = self._summary.unpack_like(gathered[index]).apply(state)
        return Carried(entering, state if self._want_total else None)


class AllGather:
    """One all-gather of the summaries."""

    name = "all_gather"

    def begin(self, comm: Comm, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool) -> _Pending:
        return _Pending(comm, summary, initial, comm.all_gather(summary.pack()), reverse, want_total)

    def traffic(self, state_bytes: int, summary_bytes: int, rank: int, size: int, *, want_total: bool) -> Traffic:
        return Traffic(summary_bytes * (size - 1), summary_bytes * (size - 1))
