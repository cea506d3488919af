"""Compares, before any work, what the processes of a run were started with: it must be the same.

They meet at the store through which they would connect to each other: a process that was given another layout, or
another device, could not take part in anything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lasp.errors import ConfigError, PeerLostError
from lasp.train.config import TrainConfig
from lasp.train.logging.versions import versions
from lasp.train.settings_file import to_dict

# What a process may have for itself: where its machine keeps token files, and how it found its device.
_OWN = ("data.cache", "device")
_number = count().__next__


def description(config: TrainConfig, resume: Path | None, device: str) -> dict[str, Any]:
    """All that decides what a process computes, by name. device: its kind, which decides the backend."""
    settings = {name: value for name, value in _flat(to_dict(config)).items() if name not in _OWN}
    return {**settings, "resume": None if resume is None else str(resume), "kind of device": device, **versions()}


def compare(own: Mapping[str, Any], *, rank: int, size: int, store: dist.Store, timeout_s: float) -> None:
    """Return where all processes give the same; collective.

    own: JSON-able values by name. "error": this process cannot go on, and why. Raises ConfigError, the same on every
    process, that says which has what; PeerLostError if one does not come.
    """
    place, wait = f"lasp-handshake-{_number()}", timedelta(seconds=timeout_s)
    try:
        store.set(f"{place}/{rank}", json.dumps(own))
        if rank == 0:
            keys = [f"{place}/{other}" for other in range(size)]
            store.wait(keys, wait)
            store.set(f"{place}/verdict", _verdict([json.loads(store.get(key)) for key in keys]))
        store.wait([f"{place}/verdict"], wait)
        verdict = store.get(f"{place}/verdict").decode()
        if verdict:  # the store may live in the first process: it stays until all have read
            store.set(f"{place}/{rank}/read", "")
            if rank == 0:
                store.wait([f"{place}/{other}/read" for other in range(size)], wait)
    except RuntimeError as error:  # a store of files has no errors of its own
        raise PeerLostError(
            f"rank {rank} of {size} compared what the processes were started with, and another did not come within "
            f"{timeout_s:g} s: {error}"
        ) from error
    if verdict:
        raise ConfigError(verdict)


def _verdict(records: list[dict[str, Any]]) -> str:
    """Describe what differs, a line each; empty if nothing does."""
    errors = [f"  rank {rank}: {record['error']}" for rank, record in enumerate(records) if "error" in record]
    lines = []
    described = {rank: record for rank, record in enumerate(records) if "error" not in record}
    for name in dict.fromkeys(name for record in described.values() for name in record):
        holders: dict[str, list[int]] = {}
        for rank, record in described.items():
            holders.setdefault(json.dumps(record.get(name, "(absent)")), []).append(rank)
        if len(holders) > 1:
            lines.append(f"  {name}: " + ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items()))
    found = []
    if errors:
        found += ["a process of the run cannot go on with what it was started with:", *errors]
    if lines:
        found += ["the processes of the run were started differently; nothing was begun:", *lines]
    return "\n".join(found)


def _ranks(ranks: list[int]) -> str:
    """Name the ranks, at most eight of them."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found
