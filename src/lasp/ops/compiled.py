"""The exchange as an operator of PyTorch's: torch.compile traces a recurrence's stages and calls this between them.

A whole exchange is one operator, so no local work runs beside it; the compiler fuses that instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.algebra import Dense, Diagonal, Identity, Scalar, Summary
from lasp.exchange.base import ExchangeResult
from lasp.exchange.replay import replayed, reserve
from lasp.recurrence.across import of_key
from lasp.sequence import SequenceParallel

_KINDS = {kind.__name__: kind for kind in (Identity, Scalar, Diagonal, Dense)}


def exchange(
    sp: SequenceParallel, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool
) -> ExchangeResult:
    """What `sp.exchange` brings, inside a compiled region."""
    kind = type(summary.transition).__name__
    entering, total = torch.ops.lasp.exchange(
        list(summary.transition.tensors()), summary.state, initial, kind, reverse, want_total, sp.key
    )
    return ExchangeResult(entering, total if want_total else None)


@torch.library.custom_op("lasp::exchange", mutates_args=())
def _exchange(
    transition: list[Tensor], state: Tensor, initial: Tensor, kind: str, reverse: bool, want_total: bool, group: int
) -> tuple[Tensor, Tensor]:
    sp: SequenceParallel = of_key(group)
    carried = None if reverse else replayed()
    if carried is None:
        shape, dtype, way = tuple(state.shape), str(state.dtype), "backward" if reverse else "forward"
        fields = {"compiled exchange of": kind, "pass": way, "state": shape, "dtype": dtype, "total": want_total}
        place = _dropped if reverse else reserve()
        begun = sp.call("recurrence", tuple(fields.values()), lambda: fields)
        assert begun is not None  # an exchange is compiled only over several ranks
        # The compiler lays tensors out as it likes; messages are contiguous.
        summary = Summary(_KINDS[kind](*(t.contiguous() for t in transition)), state.contiguous())
        options = {"reverse": reverse, "want_total": want_total}
        carried = sp.exchange.begin(begun.messages, summary, initial.contiguous(), **options).wait()
        place(carried)
    # New memory: an operator must not give its inputs back, and the compiler may write over what it is given.
    total = state.new_empty(0) if carried.total is None else _copy(carried.total)
    return _copy(carried.entering), total


def _dropped(carried: ExchangeResult) -> None:
    """Nothing that a backward pass brings is needed again."""


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


@_exchange.register_fake
def _(
    transition: list[Tensor], state: Tensor, initial: Tensor, kind: str, reverse: bool, want_total: bool, group: int
) -> tuple[Tensor, Tensor]:
    return state.new_empty(state.shape), state.new_empty(state.shape if want_total else 0)
