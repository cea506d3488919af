"""The forward and the backward pass of any recurrence over any number of ranks: its stages around an exchange.

    forward:  summarize -> start -> local outputs -> wait -> outputs
    backward: summarize the adjoint -> start, reversed -> gradients of q -> wait -> the other gradients

What is saved for backward holds the states with the other ranks' part applied (the state cache of LASP), so
backward recomputes no forward state and exchanges once. Nothing here is differentiable: `autograd` and `compiled` make
it so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.algebra import Summary
from lasp.exchange.base import ConstantDecays, PendingExchange
from lasp.exchange.start import SequenceCall, start
from lasp.recurrence.documents import Documents
from lasp.recurrence.packed_documents import PackedDocuments, zero_finals
from lasp.recurrence.stages import AnyStages, Gradients, RunInputs, Saved
from lasp.sequence import SequenceParallel


class ScanPlan(NamedTuple):
    """A plan: everything that decides how a recurrence is computed, but its inputs.

    Attributes:
        operator: that the user called.
        stages: the backend's.
        ranks: that share the sequence, or None for one device.
        want_final: the final state is an output.
        sees_all: outputs see the state after all tokens instead of the past (`causal=False`).
        documents: packed ones, or None.
        cu_seqlens: of packed ones in a compiled graph, which knows their number alone; then `documents` is None.
        options: others of the operator, which all ranks must give alike.
        change: what the operator does to its inputs once the ranks are told of them, or None.
    """

    operator: str
    stages: AnyStages
    ranks: SequenceParallel | None
    want_final: bool
    sees_all: bool = False
    documents: Documents | None = None
    cu_seqlens: Tensor | None = None
    options: Mapping[str, object] = {}
    change: Callable[[Any], Any] | None = None


def _packed(plan: ScanPlan, call: SequenceCall | None) -> PackedDocuments | None:
    """The documents' states beside what crosses the ranks in this pass; None without packing."""
    return None if plan.documents is None else PackedDocuments(plan.documents, call)


class Begun(NamedTuple):
    """A pass whose exchange is under way; without summary and exchange where one device spares them.

    Attributes:
        call: the ranks during this pass; None on one device and in compiled graphs.
    """

    call: SequenceCall | None
    summary: Summary | None
    totals: Any
    exchange: PendingExchange | None


def begin(plan: ScanPlan, call: SequenceCall | None, x: RunInputs, initial: Tensor | None) -> Begun:
    """Summarize the run and start the exchange."""
    stages = plan.stages
    if plan.ranks is None and stages.unsummarized is not None:
        return Begun(None, None, stages.unsummarized.totals(x), None)
    packed = _packed(plan, call)
    summary, totals = stages.summarize(x)
    want_total = plan.sees_all or (plan.want_final and packed is None)
    border, before = (summary, initial) if packed is None else (packed.leaving(summary, initial), None)
    exchange = start(plan.ranks, call, border, before, want_total=want_total, decays=_decays(plan, x))
    return Begun(call, summary, totals, exchange)


def forward(plan: ScanPlan, begun: Begun, x: RunInputs, initial: Tensor | None) -> tuple[Tensor, Tensor | None, Saved]:
    """The outputs, the final states if they are wanted, and what backward needs."""
    (call, summary, totals, exchange), stages = begun, plan.stages
    packed = _packed(plan, call)
    partial = stages.local_outputs(x, totals)
    entering: Any  # None for zero, only where the stages take that
    entering, total = (initial, None) if exchange is None else exchange.wait()
    entering = total if plan.sees_all else entering
    entering = entering if packed is None else packed.entering(entering, initial)
    o, saved = stages.outputs(x, totals, partial, entering)
    if not plan.want_final or (packed is None and total is not None):
        return o, total if plan.want_final else None, saved
    if stages.unsummarized is not None:
        leaving = stages.unsummarized.leaving(saved)
    else:
        assert summary is not None
        leaving = summary.apply(entering)
    return o, leaving if packed is None else packed.final(leaving, initial), saved


def _begin_adjoint(
    plan: ScanPlan,
    call: SequenceCall | None,
    x: RunInputs,
    saved: Saved,
    d_o: Tensor,
    d_final: Tensor | None,
    want_initial: bool,
) -> tuple[Begun, Tensor | None]:
    """Begin the adjoint exchange. Gives also the final states' gradient, over ranks the sum of their shares."""
    stages, ranks = plan.stages, plan.ranks
    if ranks is None and stages.unsummarized is not None:
        if not want_initial:
            return Begun(None, None, stages.unsummarized.totals_adjoint(x, saved, d_o), None), d_final
        return Begun(None, *stages.summarize_adjoint(x, saved, d_o), None), d_final
    packed = _packed(plan, call)
    summary, totals = stages.summarize_adjoint(x, saved, d_o)
    if d_final is None and not (stages.takes_no_state and (ranks is None or not plan.want_final)):
        d_final = zero_finals(plan.documents, summary)
    if call is not None and plan.want_final and d_final is not None:  # which it then is not
        d_final = call.sum(d_final)
    border, before = (summary, d_final) if packed is None else (packed.leaving_adjoint(summary, d_final), None)
    exchange = start(ranks, call, border, before, reverse=True, want_total=plan.sees_all, decays=_decays(plan, x))
    return Begun(call, summary, totals, exchange), d_final


def backward(
    plan: ScanPlan,
    call: SequenceCall | None,
    x: RunInputs,
    saved: Saved,
    d_o: Tensor,
    d_final: Tensor | None,
    want_initial: bool,
) -> tuple[Gradients, Tensor | None]:
    """The gradients of x's tensors and, if wanted, of the initial states: whole on the first rank, zero on others."""
    stages, packed = plan.stages, _packed(plan, call)
    (_, summary, totals, exchange), d_final = _begin_adjoint(plan, call, x, saved, d_o, d_final, want_initial)
    local = stages.local_gradients(x, saved, totals, d_o)
    d_leaving: Any
    d_leaving, total = (d_final, None) if exchange is None else exchange.wait()
    d_leaving = total if plan.sees_all else d_leaving
    d_leaving = d_leaving if packed is None else packed.entering_adjoint(d_leaving, d_final)
    gradients = stages.gradients(x, saved, totals, local, d_o, d_leaving)
    if not want_initial:
        return gradients, None
    assert summary is not None
    is_first = plan.ranks is None or plan.ranks.rank == 0
    if packed is None and not is_first:
        return gradients, torch.zeros_like(summary.state)
    d_initial = d_leaving if plan.sees_all else summary.state if d_leaving is None else summary.apply(d_leaving)
    d_initial = d_initial if packed is None else packed.initial(d_initial, d_final)
    return gradients, d_initial if is_first else torch.zeros_like(d_initial)


def _decays(plan: ScanPlan, x: RunInputs) -> ConstantDecays | None:
    """Constant decays: every rank knows the others'."""
    if plan.ranks is None or x.g is None or x.g.dim() > 1 or plan.documents is not None:
        return None
    batch, tokens = x.v.shape[:2]
    lengths = [tokens] * plan.ranks.size if plan.ranks.lengths is None else plan.ranks.lengths
    return ConstantDecays(x.g.detach(), lengths, batch)
