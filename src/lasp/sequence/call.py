"""One operator's pass over the ranks of a sequence, forward or backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.call import Call
from lasp.exchange.base import PendingExchange
from lasp.exchange.replay import replayed, reserve
from lasp.sequence.carry import carry

if TYPE_CHECKING:
    from lasp.sequence.sequence_parallel import SequenceParallel


class SequenceCall:
    """The ranks during one pass; what a backend sees of them (`lasp.recurrence.across.Across`).

    In the recomputation of a region that keeps what its exchanges brought there is nothing to call for: `messages` is
    None, on all ranks alike.
    """

    def __init__(self, sp: SequenceParallel, messages: Call | None, *, is_forward: bool) -> None:
        self.sp, self._messages, self._is_forward = sp, messages, is_forward

    @property
    def rank(self) -> int:
        return self.sp.rank

    @property
    def messages(self) -> Call:
        """What carries this pass's messages."""
        assert self._messages is not None, "a recomputation that exchanges nothing"
        return self._messages

    def adjoint(self, part: str = "backward") -> SequenceCall:
        """Begin the pass that takes this one's gradients. part: what to call it, where there are several."""
        return SequenceCall(self.sp, self.messages.adjoint(part), is_forward=False)

    def begin(
        self, x: Any, summary: Summary, initial: Tensor | None, *, reverse: bool = False, want_total: bool = False
    ) -> PendingExchange:
        """Start to carry the state over the ranks; see `lasp.recurrence.across.Across`."""
        return carry(self.sp, self._messages, x, summary, initial, reverse, want_total)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, added in their order."""
        if not self._is_forward:
            return self.messages.sum(tensor)
        kept = replayed()
        if kept is not None:
            total: Tensor = kept
            return total
        place = reserve()
        total = self.messages.sum(tensor)
        place(total)
        return total


def save_after(ctx: Any, tensor: Tensor) -> None:
    """At the end of an exchange in an autograd function's forward: save something, if it is nothing.

    torch.utils.checkpoint runs a region again only as far as to its last saved tensor. Whether an exchange runs again
    must not depend on what else a rank saves: where one rank sends again and another does not, a later exchange takes
    the message for its own.
    """
    if ctx.call is not None:
        ctx.save_for_backward(tensor.new_empty(0))


def adjoint_of(ctx: Any, part: str = "backward") -> Any:
    """At the beginning of that function's backward: its call, if the forward one, `ctx.call`, is not None.

    What was saved is asked for before, on every rank, because that may run a region again, with calls of its own.
    """
    _ = ctx.saved_tensors
    return None if ctx.call is None else ctx.call.adjoint(part)
