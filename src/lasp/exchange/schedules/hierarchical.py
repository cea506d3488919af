"""Two levels: inside the node, then across nodes.

1. Inside a node every rank sends its summary to the later ranks of the node, all at once.
2. The node's last rank, its leader, has the node's summary; the leaders carry the state across nodes by another
   exchange. One summary or state of a whole node crosses the network, not one of every rank.
3. The leader hands the state that enters the node to the node's other ranks; each applies the ranks before it.

Nodes are of any size; the first node knows what enters it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple, cast

from torch import Tensor

from lasp.algebra import Summary, compose
from lasp.distributed.call import Line, Messages
from lasp.distributed.comm import Pending as Message
from lasp.exchange.base import Exchange, ExchangeResult, Traffic, broadcast_traffic
from lasp.exchange.cost import Model
from lasp.exchange.payload import Payload
from lasp.exchange.schedules.doubling import Doubling


class _Place(NamedTuple):
    """A position's node, the positions of that node, and its place among them."""

    node: int
    positions: range
    order: int

    @property
    def is_leader(self) -> bool:
        return self.order == len(self.positions) - 1

    @staticmethod
    def of(position: int, nodes: Sequence[int]) -> _Place:
        start = 0
        for node, count in enumerate(nodes):
            if position < start + count:
                return _Place(node, range(start, start + count), position - start)
            start += count
        raise AssertionError("position beyond the last node")


class _Leaders:
    """The leaders of the nodes as a communicator of their own, for messages between them."""

    def __init__(self, comm: Messages, ranks: list[int]) -> None:
        self._comm, self._ranks = comm, ranks
        self.rank, self.size = ranks.index(comm.rank), len(ranks)
        self.nodes, self.backend = (1,) * len(ranks), comm.backend

    def send(self, tensor: Tensor, to: int) -> None:
        self._comm.send(tensor, self._ranks[to])

    def receive(self, like: Tensor, source: int) -> Message[Tensor]:
        return self._comm.receive(like, self._ranks[source])

    def batch_send_recv(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> list[Message[Tensor]]:
        return self._comm.batch_send_recv(
            [(tensor, self._ranks[to]) for tensor, to in sends],
            [(like, self._ranks[source]) for like, source in receives],
        )


class PendingHierarchical:
    def __init__(
        self, line: Line, nodes: Sequence[int], across: Exchange, summary: Summary, initial: Tensor, want_total: bool
    ) -> None:
        self._line, self._across, self._own = line, across, summary
        self._initial, self._want_total = initial, want_total
        self._place = place = _Place.of(line.position, nodes)
        lasts = [_Place.of(sum(nodes[:node]), nodes).positions[-1] for node in range(len(nodes))]
        self._leaders = sorted(line.rank(position) for position in lasts)
        packed = summary.pack()
        self._messages = line.comm.batch_send_recv(
            [(packed, line.rank(position)) for position in place.positions[place.order + 1 :]],
            [(packed, line.rank(position)) for position in place.positions[: place.order]],
        )

    def wait(self) -> ExchangeResult:
        line, place, own = self._line, self._place, self._own
        earlier = [own.unpack_like(message.wait()) for message in self._messages]
        before = reduce(lambda early, late: compose(late, early), earlier) if earlier else None
        entering_node = self._initial
        if place.is_leader and len(self._leaders) > 1:
            node = own if before is None else compose(own, before)
            leaders = cast(Messages, _Leaders(line.comm, self._leaders))
            across = self._across.begin(leaders, node, self._initial, reverse=line.reverse, want_total=False)
            entering_node = cast(Tensor, across.wait().entering)
        if place.node > 0:
            entering_node = self._hand_out(entering_node)
        entering = entering_node if before is None else before.apply(entering_node)
        if not self._want_total:
            return ExchangeResult(entering, None)
        last = line.size - 1
        leaving = own.apply(entering) if line.position == last else entering
        return ExchangeResult(entering, line.comm.broadcast(leaving, line.rank(last)))

    def _hand_out(self, state: Tensor) -> Tensor:
        """The state that enters the node, from its leader to its other ranks."""
        line, positions = self._line, self._place.positions
        if self._place.is_leader:
            line.comm.batch_send_recv([(state, line.rank(position)) for position in positions[:-1]], [])
            return state
        return line.comm.batch_send_recv([], [(state, line.rank(positions[-1]))])[0].wait()


@dataclass(frozen=True)
class Hierarchical(Exchange):
    """Inside nodes, then across.

    Attributes:
        ranks_per_node: consecutive ranks that make a node, the last one taking what is left; None for the ranks that
            share a host.
        across: how the leaders of the nodes carry the state; a schedule of messages, not of collectives.
    """

    ranks_per_node: int | None = None
    across: Exchange = field(default_factory=Doubling)

    @classmethod
    def is_selectable(cls, nodes: tuple[int, ...], *, peers: bool) -> bool:
        return len(nodes) > 1

    @property
    def name(self) -> str:
        nodes = "" if self.ranks_per_node is None else f" with {self.ranks_per_node} ranks a node"
        return f"hierarchical{nodes}, {self.across.name} across"

    def nodes(self, comm: Messages) -> tuple[int, ...]:
        """Ranks of every node, in rank order."""
        if self.ranks_per_node is None:
            return comm.nodes
        whole, rest = divmod(comm.size, self.ranks_per_node)
        return (self.ranks_per_node,) * whole + (rest,) * (rest > 0)

    def begin(
        self, comm: Messages, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool
    ) -> PendingHierarchical:
        nodes = self.nodes(comm)[:: -1 if reverse else 1]
        return PendingHierarchical(Line(comm, reverse), nodes, self.across, summary, initial, want_total)

    def traffic(self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool) -> Traffic:
        place = _Place.of(position, nodes)
        members = len(place.positions)
        inside = Traffic(load.summary_bytes * (members - 1 - place.order), load.summary_bytes * place.order)
        total = inside
        if place.is_leader and len(nodes) > 1:
            total += self.across.traffic(load, place.node, (1,) * len(nodes), want_total=False)
        if place.node > 0:
            state = load.state_bytes
            total += Traffic(state * (members - 1), 0) if place.is_leader else Traffic(0, state)
        return total + broadcast_traffic(load, position, sum(nodes)) if want_total else total

    def seconds(self, model: Model, *, want_total: bool) -> float:
        load, most = model.load, max(model.nodes)
        inside = Model(load, (most,), model.constants)
        # Ranks send to later ones only: half of an all-gather.
        seconds = (
            inside.gather((most - 1) * load.summary_bytes / 2) + (most - 1) * model.compose() + model.apply_summary()
        )
        if len(model.nodes) > 1:
            leaders = Model(load, (1,) * len(model.nodes), model.constants)
            seconds += self.across.seconds(leaders, want_total=False)
            seconds += model.constants.message.seconds((most - 1) * load.state_bytes)
        return seconds + model.apply_summary(alone=True) + model.broadcast(load.state_bytes) if want_total else seconds
