"""The schedules, by name: the one place where one is registered."""

from __future__ import annotations

from lasp.exchange.base import Exchange
from lasp.exchange.peer.exchange import Peer
from lasp.exchange.schedules.all_gather import AllGather
from lasp.exchange.schedules.all_to_all import AllToAll
from lasp.exchange.schedules.doubling import Doubling
from lasp.exchange.schedules.hierarchical import Hierarchical
from lasp.exchange.schedules.pipelined import Pipelined
from lasp.exchange.schedules.reach import Reach
from lasp.exchange.schedules.ring import Ring

# Those that run anywhere. Of equally fast ones "auto" takes the earlier.
EXCHANGES: dict[str, type[Exchange]] = {
    "all_gather": AllGather,
    "ring": Ring,
    "doubling": Doubling,
    "all_to_all": AllToAll,
    "pipelined": Pipelined,
    "hierarchical": Hierarchical,
    "reach": Reach,
}
# And those of GPUs which share a host.
ALL: dict[str, type[Exchange]] = {"peer": Peer, **EXCHANGES}
NAMES = ("auto", *EXCHANGES, "peer")
