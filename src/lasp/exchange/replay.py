"""Keeps what exchanges brought in the forward pass of a region that backward recomputes, for its recomputation.

Recomputing a recurrence costs local work only if the state that came from other ranks need not come again. It is one
K x V state a head, whatever the number of tokens. So in a recomputation nothing is sent, on any rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

# Recording and what was recorded, or replaying and what is left. Each thread has its own: a GPU's backward pass, and
# so its recomputation, runs in a thread of autograd's. A place is reserved where an exchange begins and filled where
# it ends, because another may begin and end meanwhile.
_region: ContextVar[tuple[bool, deque[list[Any]]] | None] = ContextVar("region", default=None)


def keeping_exchanges() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a region's forward pass and of its recomputation: a `context_fn` of torch.utils.checkpoint."""
    kept: deque[list[Any]] = deque()
    return _within(False, kept), _within(True, kept)


def is_replaying() -> bool:
    """True in a recomputation that has what its exchanges brought."""
    region = _region.get()
    return region is not None and region[0]


def recorded() -> Any:
    """The result of the next exchange, in a recomputation that has it; None elsewhere."""
    region = _region.get()
    return region[1].popleft()[0] if region is not None and region[0] else None


def reserve() -> Callable[[Any], None]:
    """The function to call with what an exchange that begins will bring. In a region's forward pass that is kept."""
    region = _region.get()
    place: list[Any] = []
    if region is not None and not region[0]:
        region[1].append(place)
    return place.append


@contextmanager
def _within(replaying: bool, kept: deque[list[Any]]) -> Iterator[None]:
    # A copy: what is taken out is still there for another backward pass through a retained graph.
    token = _region.set((replaying, deque(kept) if replaying else kept))
    try:
        yield
    finally:
        _region.reset(token)
