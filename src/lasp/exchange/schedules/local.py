"""One rank: nothing crosses."""

from __future__ import annotations

from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.call import Messages
from lasp.exchange.base import Exchange, ExchangeResult, Traffic
from lasp.exchange.cost import Model
from lasp.exchange.payload import Payload


class Ready:
    """An exchange that has ended."""

    def __init__(self, carried: ExchangeResult) -> None:
        self._carried = carried

    def wait(self) -> ExchangeResult:
        return self._carried


class Local(Exchange):
    """The exchange of a group of one."""

    name = "local"

    def begin(
        self, comm: Messages | None, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool
    ) -> Ready:
        return Ready(ExchangeResult(initial, summary.apply(initial) if want_total else None))

    def traffic(self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool) -> Traffic:
        return Traffic(0, 0)

    def seconds(self, model: Model, *, want_total: bool) -> float:
        return model.apply_summary() if want_total else 0.0
