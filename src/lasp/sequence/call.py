"""One operator's pass over the ranks of a sequence, forward or backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lasp.distributed.call import Call
from lasp.exchange.replay import recorded, reserve


class SequenceCall:
    """The ranks during one pass.

    In the recomputation of a region that keeps what its exchanges brought there is nothing to call for: `messages` is
    None, on all ranks alike.
    """

    def __init__(self, rank: int, messages: Call | None, *, is_forward: bool) -> None:
        self.rank, self._messages, self._is_forward = rank, messages, is_forward

    @property
    def messages(self) -> Call:
        """The call that carries this pass's messages."""
        assert self._messages is not None, "a recomputation that exchanges nothing"
        return self._messages

    def adjoint(self, part: str = "backward") -> SequenceCall:
        """Begin the pass that takes this one's gradients. part: what to call it, where there are several."""
        return SequenceCall(self.rank, self.messages.adjoint(part), is_forward=False)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in their order."""
        if not self._is_forward:
            return self.messages.sum(tensor)
        kept = recorded()
        if kept is not None:
            total: Tensor = kept
            return total
        place = reserve()
        total = self.messages.sum(tensor)
        place(total)
        return total


def save_after(ctx: Any, tensor: Tensor) -> None:
    """Save something, if it is nothing, at the end of an exchange in an autograd function's forward.

    torch.utils.checkpoint runs a region again only as far as to its last saved tensor. Whether an exchange runs again
    must not depend on what else a rank saves: where one rank sends again and another does not, a later exchange takes
    the message for its own.
    """
    if ctx.call is not None:
        ctx.save_for_backward(tensor.new_empty(0))


def adjoint_of(ctx: Any, part: str = "backward") -> Any:
    """The call of such a function's backward, begun at its start; None if the forward one, `ctx.call`, is None.

    What was saved is asked for before, on every rank, because that may run a region again, with calls of its own.
    """
    _ = ctx.saved_tensors
    return None if ctx.call is None else ctx.call.adjoint(part)
