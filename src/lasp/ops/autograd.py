"""A scan as a function that PyTorch differentiates: eager, traced by torch.compile, or an operator of its graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from lasp.exchange.start import SequenceCall
from lasp.ops.checks import called, ungrouped
from lasp.ops.compiled import scan_operator
from lasp.ops.scan import Begun, ScanPlan, backward, begin, forward
from lasp.recurrence.derivatives import first_derivatives
from lasp.recurrence.inputs import Inputs, initial_shape, state_dtype
from lasp.recurrence.stages import RunInputs, Saved
from lasp.recurrence.untraced import break_graph, untraced

_Function = TypeVar("_Function", bound=Callable[..., Any])

# PyTorch 2.11's compiler traces a scan and loses the gradients of the inputs, without a word; 2.13's does not.
# Where it is not known to be right the graph breaks around it instead (`not_traced_before`).
TRACEABLE: bool = TorchVersion(torch.__version__) >= "2.13"


def not_traced_before(function: _Function) -> _Function:
    """`function`, around which the graph breaks where PyTorch cannot be let trace a scan."""
    return function if TRACEABLE else untraced(function, f"a scan, with PyTorch {torch.__version__},")


def begin_early(plan: ScanPlan, x: Inputs, initial: Tensor | None) -> Begun | None:
    """Start the exchange before the queries are known, where that gains anything: k stands for q in `x`."""
    if plan.ranks is None or not plan.stages.reads_queries_late or torch.compiler.is_compiling():
        return None
    call = called(plan, x, initial)
    with torch.no_grad():
        return begin(plan, call, plan.stages.prepare(x, False), None if initial is None else initial.contiguous())


def scan(plan: ScanPlan, x: Inputs, initial: Tensor | None, begun: Begun | None = None) -> tuple[Tensor, Tensor | None]:
    """The outputs [B, T, H_v, V] and, where wanted, the final states of the global sequence, as many as initial ones.

    Args:
        initial: [B, H_v, K, V], or one for every document of the whole sequence; zero if None.
        begun: what `begin_early` gave for the same run.
    """
    if not torch.compiler.is_compiling():
        return _eager(plan, x, initial, begun)
    if plan.stages.empty_saved is not None:
        return scan_operator(plan, x, initial)
    if plan.ranks is not None and (plan.want_final or plan.documents is not None):
        # Gradients of states are summed over ranks, and documents' states carried over them, by messages of the pass.
        break_graph("output_final_state=True, or packed documents, over several ranks without fused kernels")
        return _untraced(plan, x, initial, begun)
    return (_traced if plan.stages.traceable else _untraced)(plan, x, initial, None)


def _eager(plan: ScanPlan, x: Inputs, initial: Tensor | None, begun: Begun | None) -> tuple[Tensor, Tensor | None]:
    stages, call = plan.stages, None if begun is None else begun.call
    if begun is None and plan.ranks is not None:
        call = called(plan, x, initial)
    if initial is None and not stages.takes_no_state:
        initial = x.q.new_zeros(initial_shape(x), dtype=state_dtype(x.q.dtype))
    if plan.change is not None:
        x = plan.change(x)
    if not stages.grouped_heads:
        x = ungrouped(x)
    result: tuple[Tensor, Tensor | None] = _Scan.apply(_Pass(plan, call, begun, x), initial, *x.tensors())
    return result


_untraced = untraced(_eager, "a delta rule without fused kernels")
_traced = not_traced_before(_eager)


def _exactly(function: _Function) -> _Function:
    """`function` outside autocast, which would round states to 16 bits in matrix products that PyTorch computes."""

    @wraps(function)
    def wrapped(plan: ScanPlan, call: SequenceCall | None, x: RunInputs, *arguments: Any) -> Any:
        device = x.v.device.type
        if not torch.is_autocast_enabled(device):  # to turn it off takes the host as long as a launch
            return function(plan, call, x, *arguments)
        with torch.autocast(device, enabled=False):
            return function(plan, call, x, *arguments)

    return cast(_Function, wrapped)


def _forward(
    plan: ScanPlan, call: SequenceCall | None, x: RunInputs, initial: Tensor | None, begun: Begun | None
) -> tuple[Tensor, Tensor | None, Saved]:
    return forward(plan, begun or begin(plan, call, x, initial), x, initial)


_exact_forward, _exact_backward = _exactly(_forward), _exactly(backward)


class _Pass(NamedTuple):
    """A pass as `_Scan` is given it beside its tensors: one argument, since PyTorch looks at each."""

    plan: ScanPlan
    call: SequenceCall | None
    begun: Begun | None
    given: Inputs


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of: _Pass, initial: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        plan, call, begun, given = of
        is_traced = plan.stages.empty_saved is None  # then `tensors` are others than those in `given`
        run = given.with_tensors(tensors) if is_traced else given
        x = plan.stages.prepare(run, initial is None and plan.ranks is None)
        initial = None if initial is None else initial.contiguous()
        compute = _exact_forward if plan.stages.multiplies else _forward
        o, final, saved = compute(plan, call, x, initial, begun)
        kept = x.tensors()
        ctx.plan, ctx.call, ctx.shell, ctx.count = plan, call, x.with_tensors((None,) * len(kept)), len(kept)
        ctx.set_materialize_grads(False)
        # Every tensor through save_for_backward, so that saved-tensor hooks (offloading, recomputation) see them.
        ctx.save_for_backward(*kept, *saved)
        return o, final

    @staticmethod
    @first_derivatives("a recurrence (linear_attention, delta_rule)")
    def backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
        plan: ScanPlan = ctx.plan
        # First of all, because this may recompute a region, with calls of its own.
        tensors: Sequence[Any] = ctx.saved_tensors
        call = None if ctx.call is None else ctx.call.adjoint()
        x, saved = ctx.shell.with_tensors(tensors[: ctx.count]), tuple(tensors[ctx.count :])
        d_o = torch.zeros_like(x.v) if d_o is None else d_o.contiguous()
        d_final = None if d_final is None else d_final.contiguous()
        compute = _exact_backward if plan.stages.multiplies else backward
        gradients, d_initial = compute(plan, call, x, saved, d_o, d_final, ctx.needs_input_grad[1])
        return None, d_initial, *gradients
