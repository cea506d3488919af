"""What every operation that takes `sp` does first: refuse loudly, for all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lasp.sequence.sequence_parallel import SequenceParallel


@contextmanager
def broadcast_errors(sp: SequenceParallel | None) -> Iterator[None]:
    """Tell the other ranks of a ValueError raised inside, so that they do not wait for this one.

    Raises:
        ExchangeError: instead of the ValueError where there are other ranks: the same as theirs.
    """
    try:
        yield
    except ValueError as error:
        if isinstance(sp, SequenceParallel) and sp.size > 1:
            raise sp.failed(error) from error
        raise


def check_shard(sp: SequenceParallel | None, tokens: int) -> None:
    """This rank holds as many tokens as `sp` says.

    Raises:
        ValueError: it does not, or `sp` is something else.
    """
    if sp is None:
        return
    if not isinstance(sp, SequenceParallel):
        raise ValueError(f"sp must be a SequenceParallel or None, got {type(sp).__name__}")
    if sp.lengths is not None and tokens != sp.lengths[sp.rank]:
        raise ValueError(f"rank {sp.rank} must hold lengths[{sp.rank}] = {sp.lengths[sp.rank]} tokens, got {tokens}")
