"""The one autograd function that crosses ranks: a recurrence's stages around an exchange.

    forward:  summarize -> begin -> local outputs -> wait -> outputs
    backward: summarize the adjoint -> begin, reversed -> gradients of q -> wait -> the other gradients

What is saved for backward holds the states with the other ranks' part applied (the state cache of LASP), so
backward recomputes no forward state and exchanges once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from lasp.distributed import SequenceParallel
from lasp.exchange.local import Local
from lasp.recurrence.contract import Stages


class Plan(NamedTuple):
    """How a recurrence is computed.

    Attributes:
        stages: the backend's stages.
        sp: the ranks that share the sequence, or None.
        whole: outputs see the state after all tokens instead of the past (`causal=False`).
        want_final: the final state is an output.
    """

    stages: Stages
    sp: SequenceParallel | None
    whole: bool
    want_final: bool


def scan(plan: Plan, x: Any, initial: Tensor) -> tuple[Tensor, Tensor | None]:
    """The recurrence `plan.stages` on the inputs `x`, a NamedTuple of tensors or None that ends with scale.

    Returns:
        o [B, T, H_v, V] and, where wanted, the final state of the global sequence [B, H_v, K, V].
    """
    *tensors, scale = x
    result: tuple[Tensor, Tensor | None] = _Scan.apply(plan, type(x), scale, initial, *tensors)
    return result


def _begin(plan: Plan, summary: Any, initial: Tensor, *, reverse: bool, want_total: bool) -> Any:
    want_total = want_total or plan.whole
    if plan.sp is None or plan.sp.size == 1:
        return Local().begin(None, summary, initial, reverse=reverse, want_total=want_total)
    return plan.sp.exchange.begin(plan.sp.comm, summary, initial, reverse=reverse, want_total=want_total)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, kind: Callable[..., Any], scale: float, initial: Tensor, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x, stages = kind(*inputs, scale), plan.stages
        summary, totals = stages.summarize(x)
        pending = _begin(plan, summary, initial, reverse=False, want_total=plan.want_final)
        partial = stages.local_outputs(x, totals)
        carried = pending.wait()
        o, saved = stages.outputs(x, totals, partial, carried.total if plan.whole else carried.entering)
        # Every tensor through save_for_backward, so that saved-tensor hooks (offloading, recomputation) see them.
        tensors, ctx.structure = tree_flatten((inputs, saved))
        ctx.plan, ctx.kind, ctx.scale = plan, kind, scale
        ctx.save_for_backward(*tensors)
        return o, carried.total if plan.want_final else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor | None) -> tuple[Any, ...]:
        plan, stages, sp = ctx.plan, ctx.plan.stages, ctx.plan.sp
        inputs, saved = tree_unflatten(ctx.saved_tensors, ctx.structure)
        x = ctx.kind(*inputs, ctx.scale)
        summary, totals = stages.summarize_adjoint(x, d_o)
        # A rank's gradient of the final state is its share of it: the loss is the sum over ranks.
        d_leaving = torch.zeros_like(summary.state) if d_final is None else d_final.to(summary.state.dtype)
        if plan.want_final and sp is not None:
            d_leaving = sp.comm.sum(d_leaving)
        pending = _begin(plan, summary, d_leaving, reverse=True, want_total=False)
        local = stages.local_gradients(x, saved, totals, d_o)
        carried = pending.wait()
        d_state_out = carried.total if plan.whole else carried.entering
        d_inputs = stages.gradients(x, saved, totals, local, d_o, d_state_out)
        d_initial = carried.total if plan.whole else summary.apply(carried.entering)
        if sp is not None and sp.rank > 0:
            d_initial = torch.zeros_like(d_initial)
        return None, None, None, d_initial, *d_inputs
