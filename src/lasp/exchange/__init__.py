"""How the state crosses ranks: interchangeable schedules behind one interface."""

from lasp.exchange.base import Carried, Exchange, PendingExchange, Traffic
from lasp.exchange.cost import Constants
from lasp.exchange.hierarchical import Hierarchical
from lasp.exchange.load import Load
from lasp.exchange.pipelined import Pipelined
from lasp.exchange.select import EXCHANGES, Auto, resolve

__all__ = [
    "EXCHANGES",
    "Auto",
    "Carried",
    "Constants",
    "Exchange",
    "Hierarchical",
    "Load",
    "PendingExchange",
    "Pipelined",
    "Traffic",
    "resolve",
]
