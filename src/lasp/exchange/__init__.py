"""Carries the state across ranks: interchangeable schedules behind one interface."""

from lasp.exchange.auto import Auto, resolve
from lasp.exchange.base import Exchange, ExchangeResult, PendingExchange, Traffic
from lasp.exchange.cost import Constants
from lasp.exchange.payload import Payload
from lasp.exchange.peer.exchange import Peer
from lasp.exchange.registry import EXCHANGES, NAMES
from lasp.exchange.schedules.hierarchical import Hierarchical
from lasp.exchange.schedules.pipelined import Pipelined
from lasp.exchange.schedules.reach import Reach, forgets_constant

__all__ = [
    "EXCHANGES",
    "NAMES",
    "Auto",
    "Constants",
    "Exchange",
    "ExchangeResult",
    "Hierarchical",
    "Payload",
    "Peer",
    "PendingExchange",
    "Pipelined",
    "Reach",
    "Traffic",
    "forgets_constant",
    "resolve",
]
