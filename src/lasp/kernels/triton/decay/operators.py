"""The stages on one device, around no exchange: two functions, and what makes them differentiable.

Eager calls go through one autograd function, whose cost to the host decides how short a sequence is worth while.
torch.compile gets the same two functions as operators `lasp::decay_forward` and `lasp::decay_backward`, which it puts
into its graph without looking inside. Their lists end with what backward keeps, whose number depends on the kind of
decay.
"""

# No postponed annotations: the operators' schemas are read from them.
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels.triton.common.launch import use_scratch
from lasp.kernels.triton.decay import channel_stages, stages
from lasp.kernels.triton.decay.gates import TOKEN
from lasp.kernels.triton.decay.work import Work, kind_of, per_channel, plan_of
from lasp.recurrence.contract import Run


def _forward(x: Run, work: Work, initial: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """o, and what backward keeps, beginning with the final state."""
    state_in = None if initial is None else initial.contiguous()
    _, totals = stages.totals_of(x, work, x.k, x.v, reverse=False, summarized=False)
    o, saved = stages.outputs_of(x, work, totals, stages.local_outputs_of(x, work), state_in)
    if x.v.numel() == 0:  # no kernel ran
        saved.leaving.zero_() if state_in is None else saved.leaving.copy_(state_in)
    return o, stages.saved_list(saved)


def _backward(
    x: Run,
    work: Work,
    kept: list[Tensor],
    d_o: Tensor | None,
    d_final: Tensor | None,
    from_zero: bool,
    want_initial: bool,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """The gradients of q, k, v and g, and, if wanted, of the initial state."""
    saved = stages.saved_of(x.g, kept)
    d_o = torch.zeros_like(x.v) if d_o is None else d_o.contiguous()
    d_leaving = None if d_final is None else d_final.contiguous()
    summary, totals = stages.totals_of(x, work, x.q, d_o, reverse=True, summarized=want_initial)
    local = stages.local_gradients_of(x, work, saved, d_o)
    gradients = stages.gradients_of(x, work, saved, totals, local, d_o, d_leaving, from_zero)
    if summary is None:
        return gradients, None
    return gradients, summary.state if d_leaving is None else summary.apply(d_leaving)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        initial: Tensor | None,
        scale: float,
        want_final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        x, work = stages.prepare(Run(q, k, v, g, scale))
        o, kept = _forward(x, work, initial)
        ctx.set_materialize_grads(False)
        ctx.work, ctx.from_zero = work, initial is None
        ctx.save_for_backward(x.q, x.k, x.v, x.g, *kept)
        return o, kept[0] if want_final else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        use_scratch()
        q, k, v, g, *kept = ctx.saved_tensors
        x = Run(q, k, v, g, ctx.work.scale)
        want_initial = ctx.needs_input_grad[4]
        gradients, d_initial = _backward(x, ctx.work, kept, d_o, d_final, ctx.from_zero, want_initial)
        return *gradients, d_initial, None, None


@torch.library.custom_op("lasp::decay_forward", mutates_args=())
def decay_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None, scale: float
) -> list[Tensor]:
    """o [B, T, H_v, V], the final state [B, H_v, K, V], and what else `decay_backward` takes as `kept`."""
    o, kept = _forward(*stages.prepare(Run(q, k, v, g, scale)), initial)
    return [o, *kept]


@decay_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None, scale: float) -> list[Tensor]:
    (B, _, H_v, V), K, p = v.shape, q.shape[3], plan_of(q, v, g)

    def state(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    results = [v.new_empty(v.shape), state(B, H_v, K, V), state(B, H_v, p.segments, K, V)]
    if per_channel(g):
        return [*results, *channel_stages.empty_prepared(q, v, p)]
    if kind_of(g) == TOKEN.value:
        return [*results, *(state(B, H_v, p.chunks * p.chunk) for _ in range(3))]
    return [*results, state(B, H_v, p.segments)]


@torch.library.custom_op("lasp::decay_backward", mutates_args=())
def decay_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    kept: list[Tensor],
    d_o: Tensor | None,
    d_final: Tensor | None,
    scale: float,
    from_zero: bool,
    want_gate: bool,
    want_initial: bool,
) -> list[Tensor]:
    """The gradients of q, k and v, and, if wanted, of g and of the initial state; `from_zero`: there was none."""
    g = None if g is None else g.detach().requires_grad_(want_gate)
    x, work = stages.prepare(Run(q, k, v, g, scale))
    (dq, dk, dv, dg), d_initial = _backward(x, work, kept, d_o, d_final, from_zero, want_initial)
    others = (None if dg is None else dg.contiguous(), d_initial)
    return [dq, dk, dv, *[tensor for tensor in others if tensor is not None]]


@decay_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    kept: list[Tensor],
    d_o: Tensor | None,
    d_final: Tensor | None,
    scale: float,
    from_zero: bool,
    want_gate: bool,
    want_initial: bool,
) -> list[Tensor]:
    wanted = [q, k, v, *([g] if want_gate and g is not None else []), *(kept[:1] if want_initial else [])]
    return [tensor.new_empty(tensor.shape) for tensor in wanted]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, g, initial, ctx.scale = inputs
    ctx.from_zero = initial is None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, *output[1:])


def _compiled_backward(ctx: Any, d_output: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    q, k, v, g, *kept = ctx.saved_tensors
    _, _, _, want_gate, want_initial, _ = ctx.needs_input_grad
    dq, dk, dv, *others = decay_backward(
        q, k, v, g, kept, d_output[0], d_output[1], ctx.scale, ctx.from_zero, want_gate, want_initial
    )
    return dq, dk, dv, others.pop(0) if want_gate else None, others.pop() if want_initial else None, None


decay_forward.register_autograd(_compiled_backward, setup_context=_keep)


def linear_attention(x: Run, initial: Tensor | None, want_final: bool) -> tuple[Tensor, Tensor | None]:
    """o [B, T, H_v, V] and, if wanted, the final state [B, H_v, K, V] of one device's sequence, differentiable.

    Args:
        x: q, k, v, g and scale; g in fp32; no documents.
        initial: [B, H_v, K, V], fp32; zero if None.
    """
    if torch.compiler.is_compiling():
        o, final, *_ = decay_forward(x.q, x.k, x.v, x.g, initial, x.scale)
        return o, final if want_final else None
    result: tuple[Tensor, Tensor | None] = _Eager.apply(x.q, x.k, x.v, x.g, initial, x.scale, want_final)
    return result
