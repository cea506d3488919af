"""Ranks: communication and meshes."""

from lasp.distributed.comm import Comm, Counters, ExchangeError

__all__ = ["Comm", "Counters", "ExchangeError"]
