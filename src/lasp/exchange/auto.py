"""The choice of a schedule by predicted time, and its explanation."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.call import Messages
from lasp.exchange.base import Exchange, PendingExchange, Traffic
from lasp.exchange.cost import GLOO, NCCL, Constants, Model
from lasp.exchange.payload import Payload
from lasp.exchange.peer.exchange import Peer
from lasp.exchange.peer.exchange import is_possible as peers_are_possible
from lasp.exchange.schedules.all_gather import AllGather
from lasp.exchange.schedules.all_to_all import AllToAll
from lasp.exchange.schedules.doubling import Doubling
from lasp.exchange.schedules.hierarchical import Hierarchical
from lasp.exchange.schedules.local import Local
from lasp.exchange.schedules.pipelined import Pipelined
from lasp.exchange.schedules.ring import Ring

logger = logging.getLogger("lasp.exchange")


class Candidate(NamedTuple):
    """A schedule with what it is predicted to take."""

    exchange: Exchange
    seconds: float


@cache
def rank_schedules(
    load: Payload, nodes: tuple[int, ...], constants: Constants, *, want_total: bool = False, peers: bool = False
) -> tuple[Candidate, ...]:
    """All schedules for a load, from the fastest predicted to the slowest; ties keep a fixed order.

    peers: the ranks can write into each other's memory.
    """
    model = Model(load, nodes, constants)
    schedules: list[Exchange] = [AllGather(), Ring(), Doubling(), AllToAll(), Pipelined(constants=constants)]
    if len(nodes) > 1:
        schedules.append(Hierarchical())
    if peers and constants.peer is not None and len(nodes) == 1:
        schedules.insert(0, Peer())
    candidates = [Candidate(schedule, schedule.seconds(model, want_total=want_total)) for schedule in schedules]
    ranked = tuple(sorted(candidates, key=lambda candidate: candidate.seconds))
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s", _table(load, nodes, constants, ranked, want_total))
    return ranked


def _table(
    load: Payload, nodes: tuple[int, ...], constants: Constants, candidates: tuple[Candidate, ...], want_total: bool
) -> str:
    """Predicted times, and bytes: the most that any rank sends and receives."""
    hosts = "one host" if len(nodes) == 1 else f"{len(nodes)} hosts"
    lines = [
        f"{sum(nodes)} ranks on {hosts}; state {load.state_bytes:,} bytes, with its transition "
        f"{load.summary_bytes:,}; {constants.source}",
        f"{'schedule':<40} {'predicted us':>12} {'sent':>14} {'received':>14}",
    ]
    for exchange, seconds in candidates:
        shares = [exchange.traffic(load, position, nodes, want_total=want_total) for position in range(sum(nodes))]
        sent, received = max(share.sent_bytes for share in shares), max(share.received_bytes for share in shares)
        lines.append(f"{exchange.name:<40} {seconds * 1e6:>12.1f} {sent:>14,} {received:>14,}")
    return "\n".join([*lines, f"chosen: {candidates[0].exchange.name}"])


@dataclass(frozen=True)
class Auto(Exchange):
    """The schedule that the cost model finds fastest for what is carried.

    The choice is made when the sizes are known, at every exchange, from what all ranks know: those sizes, the
    ranks' places, and the constants, which are part of the name that the ranks agree on.
    """

    constants: Constants
    selects: ClassVar[bool] = True

    @property
    def name(self) -> str:
        if self.constants in (GLOO, NCCL):
            return "auto"
        return f"auto by constants {self.constants.fingerprint}"

    def choose(
        self, load: Payload, nodes: tuple[int, ...], *, want_total: bool = False, peers: bool = False
    ) -> Exchange:
        """The schedule for a load; `nodes` as in `Exchange.traffic`, `peers` as in `rank_schedules`."""
        if sum(nodes) == 1:
            return Local()
        return rank_schedules(load, nodes, self.constants, want_total=want_total, peers=peers)[0].exchange

    def selected(self, comm: Messages, summary: Summary, *, want_total: bool) -> Exchange:
        """The schedule for what a rank is about to give. Collective when first asked for a size."""
        peers = self.constants.peer is not None and peers_are_possible(comm.comm, summary.nbytes, summary.state.device)
        return self.choose(Payload.of(summary), comm.nodes, want_total=want_total, peers=peers)

    def explain(self, load: Payload, nodes: tuple[int, ...], *, want_total: bool = False) -> str:
        """The choice as a table: predicted time and bytes of every schedule."""
        ranked = rank_schedules(load, nodes, self.constants, want_total=want_total)
        return _table(load, nodes, self.constants, ranked, want_total)

    def begin(
        self, comm: Messages, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool
    ) -> PendingExchange:
        chosen = self.selected(comm, summary, want_total=want_total)
        return chosen.begin(comm, summary, initial, reverse=reverse, want_total=want_total)

    def traffic(self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool) -> Traffic:
        return self.choose(load, nodes, want_total=want_total).traffic(load, position, nodes, want_total=want_total)

    def seconds(self, model: Model, *, want_total: bool) -> float:
        chosen = self.choose(model.load, model.nodes, want_total=want_total)
        return chosen.seconds(model, want_total=want_total)
