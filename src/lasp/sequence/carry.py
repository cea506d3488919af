"""An exchange as the ranks of a sequence make it: on the stream that suits its schedule, or from what was kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.call import Call
from lasp.exchange.auto import Auto
from lasp.exchange.base import Exchange, ExchangeResult, PendingExchange
from lasp.exchange.peer.exchange import Peer
from lasp.exchange.replay import replayed, reserve
from lasp.exchange.schedules.all_gather import AllGather
from lasp.exchange.schedules.local import Ready
from lasp.exchange.schedules.reach import Reach, forgets_constant
from lasp.exchange.side_stream import SideStream

if TYPE_CHECKING:
    from lasp.sequence.sequence_parallel import SequenceParallel


class Carrying:
    """An exchange under way; `wait` gives what it carried."""

    def __init__(
        self, pending: PendingExchange, beside: SideStream | None, keep: Callable[[ExchangeResult], None]
    ) -> None:
        self._pending, self._beside, self._keep = pending, beside, keep

    def wait(self) -> ExchangeResult:
        beside = self._beside
        if beside is None:
            carried = self._pending.wait()
        else:
            with beside.ended():
                carried = self._pending.wait()
            beside.hand_over(carried.entering)
            beside.hand_over(carried.total)
        self._keep(carried)
        return carried


def carry(
    sp: SequenceParallel,
    call: Call | None,
    x: Any,
    summary: Summary,
    initial: Tensor | None,
    reverse: bool,
    want_total: bool,
) -> PendingExchange:
    """Begin an exchange; see `Across.begin`. call: whose messages are sent; None in a recomputation.

    `AllGather` and `Peer` compute nothing before they are waited for, so they need no stream besides that of what they
    send with.
    """
    if not reverse and (carried := replayed()) is not None:
        return Ready(carried)
    assert call is not None
    keep = _dropped if reverse else reserve()
    schedule = _schedule(sp, summary, want_total)
    options = {"reverse": reverse, "want_total": want_total}
    if isinstance(schedule, Peer):
        return Carrying(schedule.begin(call, summary, initial, **options), None, keep)
    initial = torch.zeros_like(summary.state) if initial is None else initial
    if isinstance(schedule, AllGather):
        return Carrying(schedule.begin(call, summary, initial, **options), None, keep)
    beside = SideStream(initial.device, sp.comm)
    with beside.begun():
        known = {"known": known_to_forget(sp, x, initial)} if isinstance(schedule, Reach) else {}
        pending = schedule.begin(call, summary, initial, **options, **known)
    return Carrying(pending, beside, keep)


def _dropped(carried: ExchangeResult) -> None:
    """Nothing that a backward pass brings is needed again."""


def _schedule(sp: SequenceParallel, summary: Summary, want_total: bool) -> Exchange:
    """The one that "auto" chooses, once for what is carried, or the one that was asked for."""
    if not isinstance(sp.exchange, Auto):
        return sp.exchange
    carried = (type(summary.transition), summary.state.shape, summary.state.dtype, summary.state.device, want_total)
    schedule = sp.choices.get(carried)
    if schedule is None:
        schedule = sp.choices[carried] = sp.exchange.chosen(sp.comm, summary, want_total=want_total)
    return schedule


def known_to_forget(sp: SequenceParallel, x: Any, initial: Tensor) -> Any:
    """Which heads forget where, if the decays are constants: then every rank knows, and none need ask."""
    if x.g is None or x.g.dim() > 1 or x.documents is not None:
        return None
    lengths = [x.q.shape[1]] * sp.size if sp.lengths is None else sp.lengths
    return forgets_constant(x.g.detach(), lengths, x.q.shape[0], initial.dtype)
