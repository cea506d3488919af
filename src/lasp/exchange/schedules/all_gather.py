"""LASP-2's exchange (arXiv 2502.07563): every rank gathers all summaries and folds those before it.

One collective, whose time does not chain over ranks; each rank receives size - 1 summaries. Transitions travel too
(nothing, one number, or K numbers a head; K x K for delta rules). The paper writes only the decay-free prefix sum;
the fold here is the general one.
"""

from __future__ import annotations

from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.call import Line, Messages
from lasp.distributed.comm import Pending as Gathering
from lasp.exchange.base import Exchange, ExchangeResult, Traffic
from lasp.exchange.cost import Model
from lasp.exchange.payload import Payload


class PendingAllGather:
    def __init__(
        self, line: Line, summary: Summary, initial: Tensor | None, gathering: Gathering[Tensor], want_total: bool
    ) -> None:
        self._line, self._summary, self._initial = line, summary, initial
        self._gathering, self._want_total = gathering, want_total

    def wait(self) -> ExchangeResult:
        return fold(self._line, self._summary, self._initial, self._gathering.wait(), self._want_total)


def fold(line: Line, own: Summary, initial: Tensor | None, gathered: Tensor, want_total: bool) -> ExchangeResult:
    """All ranks' packed summaries [size, n], like this rank's `own`, applied to `initial` in the line's order.

    `initial` is zero if None, and then also what enters the first rank.
    """
    state, entering = initial, initial
    for position in range(line.size):
        if position == line.position:
            entering = state
            if not want_total:
                break
        state = own.unpack_like(gathered[line.rank(position)]).apply(state)
    return ExchangeResult(entering, state if want_total else None)


class AllGather(Exchange):
    """One all-gather of the summaries."""

    name = "all_gather"
    accepts_zero_initial = True
    wants_own_stream = False  # it computes nothing before it is waited for

    def begin(
        self, comm: Messages, summary: Summary, initial: Tensor | None, *, reverse: bool, want_total: bool
    ) -> PendingAllGather:
        return PendingAllGather(Line(comm, reverse), summary, initial, comm.all_gather(summary.pack()), want_total)

    def traffic(self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool) -> Traffic:
        others = sum(nodes) - 1
        return Traffic(load.summary_bytes * others, load.summary_bytes * others)

    def seconds(self, model: Model, *, want_total: bool) -> float:
        others = model.size - 1
        return model.gather(model.load.summary_bytes * others) + (others + want_total) * model.apply_summary()
