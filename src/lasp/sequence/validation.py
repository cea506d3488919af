"""What every operation that takes `sp` does first: refuse loudly, for all ranks."""

from __future__ import annotations

from types import TracebackType

from lasp.sequence.sequence_parallel import SequenceParallel


class broadcast_errors:
    """Tell the other ranks of a ValueError raised inside, so that they do not wait for this one.

    A class, because contextlib's way takes a microsecond of every operator.

    Raises:
        ExchangeError: instead of the ValueError where there are other ranks: the same as theirs.
    """

    def __init__(self, sp: SequenceParallel | None) -> None:
        self._sp = sp

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ValueError) and isinstance(self._sp, SequenceParallel) and self._sp.size > 1:
            raise self._sp.failed(error) from error


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
