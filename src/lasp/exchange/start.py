"""The door to an exchange: on the stream that suits it, replayed in a recomputation, or inside a compiled graph.

Recomputing a recurrence costs local work only if the state that came from other ranks need not come again. It is one
K x V state a head, whatever the number of tokens. So what exchanges brought in the forward pass of a region that
backward recomputes is kept, and in the recomputation nothing is sent, on any rank.

torch.compile traces a recurrence's stages and calls the whole exchange between them as one operator: no local work runs
beside it, the compiler fuses that instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any, Protocol, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lasp.algebra import Dense, Diagonal, Identity, Scalar, Summary
from lasp.distributed.call import Call
from lasp.distributed.comm import Comm
from lasp.exchange.base import ConstantDecays, Exchange, ExchangeResult, PendingExchange
from lasp.exchange.schedules.local import Local, Ready
from lasp.exchange.side_stream import SideStream


class Ranks(Protocol):
    """The ranks that share a sequence; `lasp.SequenceParallel` is one.

    Attributes:
        exchange: the schedule asked for.
        choices: those that it has selected, by what they carry; all ranks carry the same.
        key: of this object in this process: operators of torch.library take numbers, not objects.
    """

    comm: Comm
    exchange: Exchange
    choices: dict[Hashable, Exchange]
    key: int

    def call(
        self,
        operator: str,
        key: Hashable,
        fields: Callable[[], Mapping[str, object]],
        documents: str | None = None,
        inputs: Sequence[Tensor | None] = (),
        *,
        replays: bool = False,
    ) -> SequenceCall | None:
        """Begin an operator's forward pass."""
        ...


_of_key: WeakValueDictionary[int, Ranks] = WeakValueDictionary()
_new_key = count().__next__


def register(ranks: Ranks) -> int:
    """Returns a new key of these ranks."""
    key = _new_key()
    _of_key[key] = ranks
    return key


ALONE = -1  # in the place of a key: no ranks


def ranks_of(key: int) -> Ranks:
    """Returns what was registered with `key`, while it lives."""
    return _of_key[key]


def start(
    ranks: Ranks | None,
    call: SequenceCall | None,
    summary: Summary,
    initial: Tensor | None,
    *,
    reverse: bool = False,
    want_total: bool = False,
    decays: ConstantDecays | None = None,
) -> PendingExchange:
    """Start to carry the state over the ranks, from the last to the first if `reverse`.

    Args:
        ranks: that share the sequence; None for one device.
        call: their pass, of which the exchange is part; None for one device and in a graph being compiled.
        summary: this rank's.
        initial: what enters the first rank (the last, if `reverse`); zero if None.
        want_total: the state after all ranks is wanted too.
        decays: if all ranks know them beforehand.
    """
    if ranks is None:
        return Local().begin(None, summary, _state(summary, initial), reverse=reverse, want_total=want_total)
    if torch.compiler.is_compiling():
        return Ready(_compiled(ranks, summary, _state(summary, initial), reverse, want_total))
    if not reverse and (result := recorded()) is not None:
        return Ready(result)
    assert call is not None
    place = _dropped if reverse else reserve()
    schedule = _selected(ranks, summary, want_total)
    if decays is not None:
        schedule = schedule.informed(decays)
    state = cast(Tensor, initial) if schedule.accepts_zero_initial else _state(summary, initial)
    device = summary.state.device
    side = SideStream(device, ranks.comm) if schedule.wants_own_stream and device.type == "cuda" else None
    options = {"reverse": reverse, "want_total": want_total}
    if side is None:
        return Started(schedule.begin(call.messages, summary, state, **options), None, place)
    with side.begun():
        pending = schedule.begin(call.messages, summary, state, **options)
    return Started(pending, side, place)


def _dropped(result: ExchangeResult) -> None:
    """Drop the result of a backward pass's exchange: it is not needed again."""


def _state(summary: Summary, initial: Tensor | None) -> Tensor:
    return torch.zeros_like(summary.state) if initial is None else initial


def _selected(ranks: Ranks, summary: Summary, want_total: bool) -> Exchange:
    """The schedule that was asked for, or the one that it has selected, once for what is carried."""
    if not ranks.exchange.selects:
        return ranks.exchange
    carried = (type(summary.transition), summary.state.shape, summary.state.dtype, summary.state.device, want_total)
    schedule = ranks.choices.get(carried)
    if schedule is None:
        schedule = ranks.choices[carried] = ranks.exchange.selected(ranks.comm, summary, want_total=want_total)
    return schedule


class Started:
    """An exchange under way; `wait` gives what it brings."""

    def __init__(
        self, pending: PendingExchange, side: SideStream | None, place: Callable[[ExchangeResult], None]
    ) -> None:
        self._pending, self._side, self._place = pending, side, place

    def wait(self) -> ExchangeResult:
        side = self._side
        if side is None:
            result = self._pending.wait()
        else:
            with side.ended():
                result = self._pending.wait()
            side.hand_over(result.entering)
            side.hand_over(result.total)
        self._place(result)
        return result


class SequenceCall:
    """One operator's pass over the ranks of a sequence, forward or backward.

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


# Recording and what was recorded, or replaying and what is left. Each thread has its own: a GPU's backward pass, and
# so its recomputation, runs in a thread of autograd's. A place is reserved where an exchange begins and filled where
# it ends, because another may begin and end meanwhile.
_region: ContextVar[tuple[bool, deque[list[Any]]] | None] = ContextVar("region", default=None)


def keeping_exchanges() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a region's forward pass and of its recomputation: a `context_fn` of torch.utils.checkpoint.

    What a recurrence's exchange has brought, a state for each head, is kept, and no state is sent again:

        checkpoint(layer, x, use_reentrant=False, context_fn=keeping_exchanges)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keeping_exchanges})  # transformers
    """
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


_KINDS = {kind.__name__: kind for kind in (Identity, Scalar, Diagonal, Dense)}


def _compiled(ranks: Ranks, summary: Summary, initial: Tensor, reverse: bool, want_total: bool) -> ExchangeResult:
    kind = type(summary.transition).__name__
    entering, total = torch.ops.lasp.exchange(
        list(summary.transition.tensors()), summary.state, initial, kind, reverse, want_total, ranks.key
    )
    return ExchangeResult(entering, total if want_total else None)


@torch.library.custom_op("lasp::exchange", mutates_args=())
def _exchange(
    transition: list[Tensor], state: Tensor, initial: Tensor, kind: str, reverse: bool, want_total: bool, group: int
) -> tuple[Tensor, Tensor]:
    ranks, shape, way = ranks_of(group), tuple(state.shape), "backward" if reverse else "forward"
    fields = {
        "compiled exchange of": kind, "pass": way, "state": shape, "dtype": str(state.dtype), "total": want_total
    }  # fmt: skip
    call = ranks.call("recurrence", tuple(fields.values()), lambda: fields, replays=not reverse)
    # The compiler lays tensors out as it likes; messages are contiguous.
    summary = Summary(_KINDS[kind](*(t.contiguous() for t in transition)), state.contiguous())
    result = start(ranks, call, summary, initial.contiguous(), reverse=reverse, want_total=want_total).wait()
    assert result.entering is not None
    # New memory: an operator must not give its inputs back, and the compiler may write over what it is given.
    total = state.new_empty(0) if result.total is None else _copy(result.total)
    return _copy(result.entering), total


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


@_exchange.register_fake
def _(
    transition: list[Tensor], state: Tensor, initial: Tensor, kind: str, reverse: bool, want_total: bool, group: int
) -> tuple[Tensor, Tensor]:
    return state.new_empty(state.shape), state.new_empty(state.shape if want_total else 0)
