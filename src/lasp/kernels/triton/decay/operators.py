"""The stages on one device as two operators that torch.compile puts into its graph without looking inside.

`decay_forward` and `decay_backward` are the six stages around no exchange. Their lists end with what backward keeps,
whose number depends on the kind of decay.
"""

# No postponed annotations: the operators' schemas are read from them.
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.triton.decay import channel_stages, stages
from lasp.kernels.triton.decay.plan import plan
from lasp.recurrence.contract import Run


def _saved_list(saved: Any) -> list[Tensor]:
    if isinstance(saved, channel_stages.Saved):
        return [saved.entering, saved.leaving, *saved.prepared]
    return list(saved)


def _saved_tuple(g: Tensor | None, tensors: list[Tensor]) -> Any:
    if g is not None and g.dim() == 4:
        return channel_stages.Saved(tensors[0], tensors[1], channel_stages.Prepared(*tensors[2:]))
    return stages.Saved(*tensors)


@torch.library.custom_op("lasp::decay_forward", mutates_args=())
def decay_forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor, scale: float) -> list[Tensor]:
    """o [B, T, H_v, V], the final state [B, H_v, K, V], and what `decay_backward` takes as `saved`."""
    x = Run(q, k, v, g, scale)
    summary, totals = stages.summarize(x)
    o, saved = stages.outputs(x, totals, stages.local_outputs(x, totals), initial)
    return [o, summary.apply(initial), *_saved_list(saved)]


@decay_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor, scale: float) -> list[Tensor]:
    B, T, H_v, V = v.shape
    K = q.shape[3]
    kind = stages.kind_of(g)
    p = plan(T, B * H_v, K, V, q.dtype, kind, *stages.device_limits(q.device))
    states = [initial.new_empty(B, H_v, p.segments, K, V), torch.empty_like(initial)]
    if g is not None and g.dim() == 4:
        prepared = [q.new_empty(B, H_v, T, p.chunk), q.new_empty(B, T, H_v, K), q.new_empty(B, T, H_v, K)]
        saved = [*states, *prepared, initial.new_empty(B, H_v, -(-T // p.chunk), K)]
    else:
        saved = [*states, initial.new_empty(2, B, H_v, T if g is not None and g.dim() == 3 else p.segments)]
    return [v.new_empty(v.shape), torch.empty_like(initial), *saved]


@torch.library.custom_op("lasp::decay_backward", mutates_args=())
def decay_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    saved: list[Tensor],
    d_o: Tensor,
    d_final: Tensor,
    scale: float,
    gate_gradient: bool,
) -> list[Tensor]:
    """The gradients of q, k, v and the initial state, and, if wanted, of g."""
    x = Run(q, k, v, None if g is None else g.detach().requires_grad_(gate_gradient), scale)
    kept = _saved_tuple(g, saved)
    summary, totals = stages.summarize_adjoint(x, d_o)
    local = stages.local_gradients(x, kept, totals, d_o)
    dq, dk, dv, dg = stages.gradients(x, kept, totals, local, d_o, d_final)
    gradients = [dq, dk, dv, summary.apply(d_final)]
    return [*gradients, dg.contiguous()] if gate_gradient else gradients


@decay_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    saved: list[Tensor],
    d_o: Tensor,
    d_final: Tensor,
    scale: float,
    gate_gradient: bool,
) -> list[Tensor]:
    gradients = [q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(d_final)]
    return [*gradients, g.new_empty(g.shape)] if gate_gradient else gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, g, _, ctx.scale = inputs
    ctx.has_gate = g is not None
    ctx.gate_gradient = ctx.needs_input_grad[3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *(() if g is None else (g,)), *output[1:])


def _backward(ctx: Any, d_output: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    tensors = list(ctx.saved_tensors)
    q, k, v = tensors[:3]
    g = tensors[3] if ctx.has_gate else None
    final, *saved = tensors[3 + ctx.has_gate :]
    d_o = torch.zeros_like(v) if d_output[0] is None else d_output[0]
    d_final = torch.zeros_like(final) if d_output[1] is None else d_output[1]
    dq, dk, dv, d_initial, *dg = decay_backward(q, k, v, g, saved, d_o, d_final, ctx.scale, ctx.gate_gradient)
    return dq, dk, dv, dg[0] if dg else None, d_initial, None


decay_forward.register_autograd(_backward, setup_context=_setup)


def linear_attention(x: Run, initial: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, T, H_v, V] and the final state [B, H_v, K, V] of one device's sequence, differentiable.

    Args:
        x: q, k, v, g and scale; g in fp32.
        initial: [B, H_v, K, V], fp32.
    """
    o, final, *_ = decay_forward(x.q, x.k, x.v, x.g, initial, x.scale)
    return o, final
