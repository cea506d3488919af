"""The autograd function that crosses ranks for any backend: a recurrence's stages around an exchange.

    forward:  summarize -> begin -> local outputs -> wait -> outputs
    backward: summarize the adjoint -> begin, reversed -> gradients of q -> wait -> the other gradients

A backend whose stages are fused has its own way through the same steps.

What is saved for backward holds the states with the other ranks' part applied (the state cache of LASP), so
backward recomputes no forward state and exchanges once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_flatten, tree_unflatten

from lasp.algebra import Summary
from lasp.exchange.schedules.local import Local, Ready
from lasp.ops.compiled import exchange
from lasp.recurrence.derivatives import first_derivatives
from lasp.recurrence.documents import Documents
from lasp.recurrence.packed_documents import PackedDocuments, zero_finals
from lasp.recurrence.stages import Stages, tensors_of
from lasp.sequence import SequenceParallel
from lasp.sequence.call import SequenceCall

_Function = TypeVar("_Function", bound=Callable[..., Any])


class ScanPlan(NamedTuple):
    """How a recurrence is computed.

    Attributes:
        stages: the backend's stages.
        sp: the ranks that share the sequence, or None.
        call: what they were told of; None without others, and in compiled graphs, whose exchanges tell them.
        whole: outputs see the state after all tokens instead of the past (`causal=False`).
        want_final: the final state is an output.
    """

    stages: Stages
    sp: SequenceParallel | None
    call: SequenceCall | None
    whole: bool
    want_final: bool


# PyTorch 2.11's compiler traces `scan` and loses the gradients of the inputs, without a word; 2.13's does not.
# Where it is not known to be right the graph breaks around it instead (`not_traced_before`).
TRACEABLE: bool = TorchVersion(torch.__version__) >= "2.13"


_FINAL_IN_GRAPH = (
    "output_final_state=True over several ranks cannot be part of a compiled graph: leave fullgraph=True out, and the "
    "graph breaks around the operator, or ask for the final state outside of the compiled function"
)


def untraced(function: _Function) -> _Function:
    """`function`, around which a compiled graph breaks.

    As `torch.compiler.disable`, which loads the compiler: half of the time that importing this library would take.
    PyTorch's own way loads it at the first call, so uncompiled calls do not go by it.
    """
    disabled = torch._disable_dynamo(function)

    @wraps(function)
    def wrapped(*arguments: Any) -> Any:
        return disabled(*arguments) if torch.compiler.is_compiling() else function(*arguments)

    return cast(_Function, wrapped)


def not_traced_before(function: _Function) -> _Function:
    """`function`, around which the graph breaks where PyTorch cannot be let trace a scan."""
    return function if TRACEABLE else untraced(function)


def scan(plan: ScanPlan, x: Any, initial: Tensor) -> tuple[Tensor, Tensor | None]:
    """The recurrence `plan.stages` on the inputs `x`, a NamedTuple of tensors or None that ends with scale, documents.

    Args:
        initial: [B, H_v, K, V], or one for every document of the whole sequence.

    Returns:
        o [B, T, H_v, V] and, where wanted, the final states of the global sequence, as many as initial ones.
    """
    run = partial(_rebuilt, type(x), x.scale, x.documents)
    result: tuple[Tensor, Tensor | None] = _Scan.apply(plan, run, initial, *tensors_of(x))
    return result


def refuse_final_in_graph(sp: SequenceParallel | None, want_final: bool) -> None:
    """Break the compiler's graph where the final state of several ranks is wanted; with fullgraph=True, say so.

    Its gradients are summed over the ranks, by a message that is no operator yet.
    """
    if want_final and sp is not None and sp.size > 1 and torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=_FINAL_IN_GRAPH)


def _rebuilt(kind: Callable[..., Any], scale: float, documents: Documents | None, tensors: tuple[Any, ...]) -> Any:
    return kind(*tensors, scale, documents)


def _begin(
    plan: ScanPlan,
    call: SequenceCall | None,
    x: Any,
    summary: Summary,
    initial: Tensor,
    *,
    reverse: bool,
    want_total: bool,
) -> Any:
    """Begin the exchange of one pass: a `lasp.exchange.base.PendingExchange`."""
    sp, want_total = plan.sp, want_total or plan.whole
    if sp is None or sp.size == 1:
        return Local().begin(None, summary, initial, reverse=reverse, want_total=want_total)
    if call is None:
        return Ready(exchange(sp, summary, initial, reverse=reverse, want_total=want_total))
    return call.begin(x, summary, initial, reverse=reverse, want_total=want_total)


def _from_zero(summary: Summary) -> tuple[Summary, Tensor]:
    return summary, torch.zeros_like(summary.state)


def _exactly(function: _Function) -> _Function:
    """`function` outside autocast, which would round states to 16 bits in the stages' matrix products."""

    @wraps(function)
    def wrapped(*arguments: Any) -> Any:
        device = next(a.device.type for a in arguments if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return cast(_Function, wrapped)


class _Scan(torch.autograd.Function):
    @staticmethod
    @_exactly
    def forward(
        ctx: Any,
        plan: ScanPlan,
        run: Callable[..., Any],
        initial: Tensor,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        x, stages, call = run(inputs), plan.stages, plan.call
        packed = None if x.documents is None else PackedDocuments(x.documents, call)
        summary, totals = stages.summarize(x)
        border, before = (summary, initial) if packed is None else _from_zero(packed.leaving(summary, initial))
        want_total = plan.want_final and packed is None
        exchanging = _begin(plan, call, x, border, before, reverse=False, want_total=want_total)
        partial_outputs = stages.local_outputs(x, totals)
        carried = exchanging.wait()
        entering = carried.total if plan.whole else carried.entering
        entering = entering if packed is None else packed.entering(entering, initial)
        assert entering is not None  # nothing is None here
        o, saved = stages.outputs(x, totals, partial_outputs, entering)
        final = carried.total
        if packed is not None and plan.want_final:
            final = packed.final(summary.apply(entering), initial)
        # Every tensor through save_for_backward, so that saved-tensor hooks (offloading, recomputation) see them.
        tensors, ctx.structure = tree_flatten((inputs, saved))
        ctx.plan, ctx.run = plan, run
        ctx.save_for_backward(*tensors)
        return o, final if plan.want_final else None

    @staticmethod
    @first_derivatives("a recurrence (linear_attention, delta_rule)")
    @_exactly
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor | None) -> tuple[Any, ...]:
        plan, stages, sp = ctx.plan, ctx.plan.stages, ctx.plan.sp
        # First of all, because this may recompute a region, with calls of its own.
        inputs, saved = tree_unflatten(ctx.saved_tensors, ctx.structure)
        x, call = ctx.run(inputs), None if plan.call is None else plan.call.adjoint()
        packed = None if x.documents is None else PackedDocuments(x.documents, call)
        summary, totals = stages.summarize_adjoint(x, saved, d_o)
        d_final = zero_finals(x, summary) if d_final is None else d_final.to(summary.state.dtype)
        # A rank's gradient of the final state is its share of it: the loss is the sum over ranks.
        if plan.want_final and sp is not None:
            d_final = sp.comm.sum(d_final) if call is None else call.sum(d_final)
        border, before = (summary, d_final) if packed is None else _from_zero(packed.leaving_adjoint(summary, d_final))
        exchanging = _begin(plan, call, x, border, before, reverse=True, want_total=False)
        local = stages.local_gradients(x, saved, totals, d_o)
        carried = exchanging.wait()
        d_leaving: Any = carried.total if plan.whole else carried.entering
        d_leaving = d_leaving if packed is None else packed.entering_adjoint(d_leaving, d_final)
        d_inputs = stages.gradients(x, saved, totals, local, d_o, d_leaving)
        d_initial = None
        if ctx.needs_input_grad[2]:
            d_initial = d_leaving if plan.whole else summary.apply(d_leaving)
            d_initial = d_initial if packed is None else packed.initial(d_initial, d_final)
            # Whole on the first rank: the ranks' gradients are shares of one sum.
            d_initial = d_initial if sp is None or sp.rank == 0 else torch.zeros_like(d_initial)
        return None, None, d_initial, *d_inputs
