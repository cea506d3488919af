"""From a name to an exchange."""

from __future__ import annotations

from lasp.exchange.all_gather import AllGather
from lasp.exchange.base import Exchange
from lasp.exchange.local import Local
from lasp.exchange.ring import Ring

EXCHANGES: dict[str, type[Exchange]] = {"ring": Ring, "all_gather": AllGather}


def resolve(exchange: str | Exchange, size: int) -> Exchange:
    """The exchange named, or given, for a group of `size` ranks.

    "auto" takes the all-gather: with latency alpha and time b for one state it costs alpha + (size - 1) b where
    the ring costs (size - 1) (alpha + b).

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(exchange, str) and exchange != "auto" and exchange not in EXCHANGES:
        raise ValueError(f'exchange must be "auto", an Exchange, or one of {sorted(EXCHANGES)}; got {exchange!r}')
    if size == 1:
        return Local()
    if not isinstance(exchange, str):
        return exchange
    return EXCHANGES["all_gather" if exchange == "auto" else exchange]()
