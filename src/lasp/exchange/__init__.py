"""How the state crosses ranks: interchangeable schedules behind one interface."""

from lasp.exchange.auto import Auto
from lasp.exchange.base import Carried, Exchange, PendingExchange, Traffic
from lasp.exchange.cost import Constants
from lasp.exchange.hierarchical import Hierarchical
from lasp.exchange.load import Load
from lasp.exchange.peer import Peer
from lasp.exchange.pipelined import Pipelined
from lasp.exchange.reach import Reach, forgets_constant
from lasp.exchange.select import EXCHANGES, NAMES, resolve

__all__ = [
    "EXCHANGES",
    "NAMES",
    "Auto",
    "Carried",
    "Constants",
    "Exchange",
    "Hierarchical",
    "Load",
    "Peer",
    "PendingExchange",
    "Pipelined",
    "Reach",
    "Traffic",
    "forgets_constant",
    "resolve",
]
