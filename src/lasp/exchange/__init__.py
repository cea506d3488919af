"""How the state crosses ranks: interchangeable schedules behind one interface."""

from lasp.exchange.base import Carried, Exchange, PendingExchange, Traffic
from lasp.exchange.select import EXCHANGES, resolve

__all__ = ["EXCHANGES", "Carried", "Exchange", "PendingExchange", "Traffic", "resolve"]
