"""From a name to an exchange."""

from __future__ import annotations

from collections.abc import Callable

from lasp.exchange.auto import Auto
from lasp.exchange.base import Exchange
from lasp.exchange.cost import defaults
from lasp.exchange.peer.exchange import Peer
from lasp.exchange.schedules.all_gather import AllGather
from lasp.exchange.schedules.all_to_all import AllToAll
from lasp.exchange.schedules.doubling import Doubling
from lasp.exchange.schedules.hierarchical import Hierarchical
from lasp.exchange.schedules.local import Local
from lasp.exchange.schedules.pipelined import Pipelined
from lasp.exchange.schedules.reach import Reach
from lasp.exchange.schedules.ring import Ring

# Those that run anywhere.
EXCHANGES: dict[str, Callable[[], Exchange]] = {
    "ring": Ring,
    "all_gather": AllGather,
    "pipelined": Pipelined,
    "doubling": Doubling,
    "all_to_all": AllToAll,
    "hierarchical": Hierarchical,
    "reach": Reach,
}


# All names, with that of GPUs which share a host.
NAMES = ("auto", *EXCHANGES, Peer.name)


def resolve(exchange: str | Exchange, size: int, backend: str = "gloo") -> Exchange:
    """The exchange named, or given, for a group of `size` ranks over a backend of torch.distributed.

    "auto" chooses for every exchange by the cost model with the backend's default constants; for measured ones pass
    `Auto(Constants.load(path))`. "peer" takes GPUs of one host.

    Raises:
        ValueError: the name is unknown, or nothing for this backend.
    """
    if exchange not in NAMES if isinstance(exchange, str) else not isinstance(exchange, Exchange):
        raise ValueError(f"exchange must be an Exchange or one of {', '.join(NAMES)}; got {exchange!r}")
    if size == 1:
        return Local()
    if not isinstance(exchange, str):
        return exchange
    if exchange == Peer.name:
        if backend != "nccl":
            raise ValueError(f'exchange "peer" takes GPUs of one host, over NCCL; this group is over {backend}')
        return Peer()
    return Auto(defaults(backend)) if exchange == "auto" else EXCHANGES[exchange]()
