"""What exchanges brought in the forward pass of a region that backward recomputes, kept for its recomputation.

Recomputing a recurrence costs local work only if the state that came from other ranks need not come again. It is one
K x V state a head, whatever the number of tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from lasp.exchange.base import Carried

# Recording and what was recorded, or replaying and what is left. Each thread has its own: a GPU's backward pass, and
# so its recomputation, runs in a thread of autograd's.
_region: ContextVar[tuple[bool, deque[Carried]] | None] = ContextVar("region", default=None)


def keeping_exchanges() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a region's forward pass and of its recomputation: a `context_fn` of torch.utils.checkpoint."""
    kept: deque[Carried] = deque()
    return _within(False, kept), _within(True, kept)


def replayed() -> Carried | None:
    """In a recomputation, what the next exchange brought; None elsewhere."""
    region = _region.get()
    return region[1].popleft() if region is not None and region[0] else None


def keep(carried: Carried) -> None:
    """In the forward pass of such a region, remember what an exchange brought."""
    region = _region.get()
    if region is not None and not region[0]:
        region[1].append(carried)


@contextmanager
def _within(replaying: bool, kept: deque[Carried]) -> Iterator[None]:
    # A copy: what is taken out is still there for another backward pass through a retained graph.
    token = _region.set((replaying, deque(kept) if replaying else kept))
    try:
        yield
    finally:
        _region.reset(token)
