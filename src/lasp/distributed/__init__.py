"""Ranks: communication, shards, meshes."""

from lasp.distributed.comm import Comm, Counters, ExchangeError
from lasp.distributed.sequence_parallel import SequenceParallel

__all__ = ["Comm", "Counters", "ExchangeError", "SequenceParallel"]
