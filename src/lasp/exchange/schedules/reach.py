"""Decay reach: a head that forgets over a shard needs nothing from beyond it.

Where a rank's transition is exactly zero in the state's dtype (a decay that underflows, a document that starts),
what enters the rank does not change what leaves it. So the rank need not wait for it to send on: the chain is cut
there. First all ranks learn which heads forget on which ranks (a byte a head, gathered, unless it is known
beforehand). Then, per head,

    at most `max_hops` messages in a row    chain: those that forget send at `begin`, the others when they know
    more                                    the base exchange carries these heads, and only these

With constant decays and long shards nearly all heads need one message from their neighbour: one state instead of the
size - 1 of an all-gather, in one hop instead of the size - 1 of a ring.

What is promised: the states have the same bits as with the base exchange for all heads, if states are finite and the
base gives the bits of the chain (all but those that compose transitions). Two exceptions: a zero may have the other
sign where a rank adds -0.0, and NaN or infinity do not pass a rank that forgets, where 0 * NaN would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.algebra import Summary, Transition
from lasp.distributed.call import Line, Messages
from lasp.distributed.comm import Pending as Message
from lasp.exchange.base import ConstantDecays, Exchange, ExchangeResult, PendingExchange, Traffic
from lasp.exchange.cost import Model
from lasp.exchange.payload import Payload, flat, flatten, select_heads
from lasp.exchange.schedules.all_gather import AllGather
from lasp.exchange.schedules.ring import Ring

# exp of less is zero, whatever the machine does with subnormal numbers: log(2^-150) and log(2^-1075), and a bit.
ZERO_BELOW = {torch.float32: -104.0, torch.float64: -746.0}


def forgets(transition: Transition, state: Tensor) -> Tensor:
    """Mask of the heads whose transitions are exactly zero, for a flat summary's parts; bool [heads]."""
    # Elementwise maps show on a column of ones what they do; others on every basis vector.
    size = state.shape[-2]
    probe = state.new_ones(size, 1) if "K" in transition.sliceable else torch.eye(size).to(state)
    after = transition.apply(probe.expand(state.shape[0], *probe.shape))
    return (after == 0).flatten(1).all(1)


def forgets_constant(log_decay: Tensor, lengths: Sequence[int], batch: int, dtype: torch.dtype) -> Tensor:
    """Mask of the heads with a constant decay that forget, on every rank, without communication.

    Args:
        log_decay: [H], natural logarithm of the decay of one token; the same on all ranks.
        lengths: tokens of every rank.
        batch: sequences.
        dtype: of the state, fp32 or fp64.

    Returns:
        bool [ranks, batch * H], on the host.
    """
    tokens = torch.tensor(lengths, dtype=torch.float64)
    return (tokens[:, None] * log_decay.double().cpu() < ZERO_BELOW[dtype]).repeat(1, batch)


class _Route(NamedTuple):
    """Heads by the way in which this rank handles them; every field holds indices of heads.

    Attributes:
        near, far: those of the chain, those of the base exchange.
        sent_early, sent_late: of `near`, what this rank sends at once, and when it knows what enters it.
        got_early, got_late: the same of the rank before.
    """

    near: Tensor
    far: Tensor
    sent_early: Tensor
    sent_late: Tensor
    got_early: Tensor
    got_late: Tensor

    @staticmethod
    def of(forgets: Tensor, position: int, max_hops: int) -> _Route:
        """`forgets` [positions, heads] in the direction of the exchange."""
        size, heads = forgets.shape
        # The first rank knows what enters it, so it is as if it forgot; the last sends nothing on.
        knows = forgets.clone()
        knows[0] = True
        hops = torch.ones(heads, dtype=torch.long)
        longest = hops
        for at in range(1, size - 1):
            hops = torch.where(knows[at], 1, hops + 1)
            longest = torch.maximum(longest, hops)
        near = longest <= max_hops
        none = torch.zeros_like(near)
        sender, before = near & (position < size - 1), near & (position > 0)
        early_before = knows[position - 1] if position > 0 else none
        masks = (
            near,
            ~near,
            sender & knows[position],
            sender & ~knows[position],
            before & early_before,
            before & ~early_before,
        )
        return _Route(*(mask.nonzero().flatten() for mask in masks))


class PendingReach:
    def __init__(
        self,
        line: Line,
        base: Exchange,
        summary: Summary,
        initial: Tensor,
        want_total: bool,
        route: _Route,
    ) -> None:
        self._line, self._initial, self._want_total = line, initial, want_total
        self._summary = flatten(summary)
        device = initial.device
        self._route = route = _Route(*(heads.to(device) for heads in route))
        self._early = self._receive(route.got_early)
        # What enters does not matter to these heads; on the first rank it is the initial state.
        if len(route.sent_early):
            entering = flat(initial)[route.sent_early]
            if line.position > 0:
                entering = torch.zeros_like(entering)
            self._send(select_heads(self._summary, route.sent_early).apply(entering))
        # Messages between two ranks keep their order: early, those of the base, late.
        self._base: PendingExchange | None = None
        if len(route.far):
            far, state = select_heads(self._summary, route.far), flat(initial)[route.far]
            self._base = base.begin(line.comm, far, state, reverse=line.reverse, want_total=want_total)

    def _receive(self, heads: Tensor) -> Message[Tensor] | None:
        if not len(heads):
            return None
        like = self._summary.state.new_empty(len(heads), *self._summary.state.shape[1:])
        return self._line.comm.receive(like, self._line.rank(self._line.position - 1))

    def _send(self, state: Tensor) -> None:
        self._line.comm.send(state, self._line.rank(self._line.position + 1))

    def wait(self) -> ExchangeResult:
        line, route = self._line, self._route
        entering = flat(self._initial).clone()
        total = torch.empty_like(entering) if self._want_total else None
        if self._early is not None:
            entering[route.got_early] = self._early.wait()
        if self._base is not None:
            carried = self._base.wait()
            assert carried.entering is not None
            entering[route.far] = carried.entering
            if total is not None and carried.total is not None:
                total[route.far] = carried.total
        late = self._receive(route.got_late)
        if late is not None:
            entering[route.got_late] = late.wait()
        if len(route.sent_late):
            self._send(select_heads(self._summary, route.sent_late).apply(entering[route.sent_late]))
        if total is not None and len(route.near):
            leaving = select_heads(self._summary, route.near).apply(entering[route.near])
            total[route.near] = line.comm.broadcast(leaving, line.rank(line.size - 1))
        shape = self._initial.shape
        return ExchangeResult(entering.view(shape), None if total is None else total.view(shape))


@dataclass(frozen=True)
class Reach(Exchange):
    """Neighbours for the heads that forget, another exchange for the others.

    On a GPU this waits for the transitions to be computed, as the host must read which heads forget; where `decays`
    or `known` tell, it does not.

    Attributes:
        base: carries the heads whose state goes far.
        max_hops: heads of which no message has to go further than so many ranks in a row take the chain.
        decays: of the run, if all ranks know them beforehand.
    """

    base: Exchange = field(default_factory=AllGather)
    max_hops: int = 2
    decays: ConstantDecays | None = field(default=None, compare=False, repr=False)

    @classmethod
    def is_selectable(cls, nodes: tuple[int, ...], *, peers: bool) -> bool:
        return False  # what it sends depends on the decays

    @property
    def name(self) -> str:
        return f"reach of {self.max_hops} hops, {self.base.name} beyond"

    def informed(self, decays: ConstantDecays) -> Reach:
        return replace(self, decays=decays)

    def begin(
        self,
        comm: Messages,
        summary: Summary,
        initial: Tensor,
        *,
        reverse: bool,
        want_total: bool,
        known: Tensor | None = None,
    ) -> PendingReach:
        """Start; `known` is bool [ranks, heads] on the host, the same everywhere: which heads surely forget where."""
        line = Line(comm, reverse)
        if known is None and self.decays is not None:
            known = forgets_constant(*self.decays, initial.dtype)
        if known is None and comm.size == 2:  # the first rank knows what enters it, and the second sends nothing
            known = torch.zeros(2, Payload.of(summary).heads, dtype=torch.bool)
        elif known is None:
            whole = flatten(summary)
            own = forgets(whole.transition, whole.state).to(torch.uint8)
            known = comm.all_gather(own).wait().cpu().bool()
        if reverse:
            known = known.flip(0)
        route = _Route.of(known, line.position, self.max_hops)
        return PendingReach(line, self.base, summary, initial, want_total, route)

    def traffic(
        self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool, known: Tensor | None = None
    ) -> Traffic:
        """Traffic where no head forgets; with `known`, which heads do, as in `begin`, in the exchange's direction."""
        size = sum(nodes)
        mask_bytes = 0 if known is not None or size == 2 else load.heads * (size - 1)
        if known is None:
            known = torch.zeros(size, load.heads, dtype=torch.bool)
        return Traffic(mask_bytes, mask_bytes) + self.routed_traffic(load, position, nodes, known, want_total)

    def routed_traffic(
        self, load: Payload, position: int, nodes: tuple[int, ...], forgets: Tensor, want_total: bool
    ) -> Traffic:
        """The payload of states and summaries where `forgets` [positions, heads] is so."""
        size, route = sum(nodes), _Route.of(forgets, position, self.max_hops)
        one = replace(load, heads=1).state_bytes
        near, far = len(route.near) * one, replace(load, heads=len(route.far))
        total = Traffic(near * (position < size - 1), near * (position > 0))
        if far.heads:
            total += self.base.traffic(far, position, nodes, want_total=want_total)
        if want_total:
            last = position == size - 1
            total += Traffic(near * (size - 1) * last, near * (not last))
        return total

    def seconds(self, model: Model, *, want_total: bool) -> float:
        """Seconds where no head forgets: more is not known when the exchange is chosen."""
        if model.size == 2:
            return Ring().seconds(model, want_total=want_total)
        return model.gather(model.load.heads * (model.size - 1)) + self.base.seconds(model, want_total=want_total)
