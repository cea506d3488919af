"""Scans as operators of PyTorch's, which torch.compile puts into its graphs without looking inside.

For stages that are fused kernels. The operators know the ranks by a number and take no packed documents. Their lists
end with what backward takes as `saved`, whose number depends on the kind of decay.
"""

# No postponed annotations: the operators' schemas are read from them.
from typing import Any

import torch
from torch import Tensor

from lasp.exchange.start import SequenceCall, ranks_of
from lasp.kernels.select import load
from lasp.ops.scan import ScanPlan, backward, begin, forward
from lasp.recurrence.inputs import DecayInputs

ALONE = -1


def scan_operator(plan: ScanPlan, x: DecayInputs, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Compute outputs and the final state inside a compiled region: `lasp.ops.autograd.scan` as operators."""
    ranks = ALONE if plan.ranks is None else plan.ranks.key
    want_gate = x.g is not None and x.g.requires_grad
    o, *others = decay_forward(x.q, x.k, x.v, x.g, initial, x.scale, want_gate, plan.want_final, ranks)
    return o, (others[0] if plan.ranks is None else others[-1]) if plan.want_final else None


def _plan(x: DecayInputs, want_final: bool, key: int) -> ScanPlan:
    ranks = None if key == ALONE else ranks_of(key)
    return ScanPlan("linear_attention", load("decay", "triton", x), ranks, want_final)  # type: ignore[arg-type]


def _called(plan: ScanPlan, q: Tensor, v: Tensor, *, backward: bool = False) -> SequenceCall | None:
    """Tell the other ranks what is about to be computed."""
    if plan.ranks is None:
        return None
    state = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    fields = {"pass": "backward" if backward else "forward", "state": state, "output_final_state": plan.want_final}
    return plan.ranks.call("compiled linear_attention", tuple(fields.values()), lambda: fields, replays=not backward)


def _inputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, want_gate: bool) -> DecayInputs:
    return DecayInputs(q, k, v, None if g is None else g.detach().requires_grad_(want_gate), scale)


@torch.library.custom_op("lasp::decay_forward", mutates_args=())
def decay_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    scale: float,
    want_gate: bool,
    want_final: bool,
    ranks: int,
) -> list[Tensor]:
    """o [B, T, H_v, V], and what `decay_backward` takes as `saved`, first the state [B, H_v, K, V] that leaves.

    ranks: the key of the ranks that share the sequence, or ALONE; with ranks, the final state comes last if wanted.
    """
    given = _inputs(q, k, v, g, scale, want_gate)
    plan = _plan(given, want_final, ranks)
    x = plan.stages.prepare(given, initial is None and ranks == ALONE)
    initial = None if initial is None else initial.contiguous()
    o, final, saved = forward(plan, begin(plan, _called(plan, q, v), x, initial), x, initial)
    # An exchange may give back its input, an operator must not.
    return [o, *saved, *([final.clone()] if plan.ranks is not None and want_final and final is not None else [])]


@decay_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    scale: float,
    want_gate: bool,
    want_final: bool,
    ranks: int,
) -> list[Tensor]:
    final = [q.new_empty((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)]
    x = DecayInputs(q, k, v, g, scale)
    empty_saved = load("decay", "triton", x).empty_saved
    assert empty_saved is not None
    saved = empty_saved(x, initial is None and ranks == ALONE, want_gate)
    return [v.new_empty(v.shape), *saved, *(final if want_final and ranks != ALONE else [])]


@torch.library.custom_op("lasp::decay_backward", mutates_args=())
def decay_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    saved: list[Tensor],
    d_o: Tensor | None,
    d_final: Tensor | None,
    scale: float,
    from_zero: bool,
    want_gate: bool,
    want_initial: bool,
    want_final: bool,
    ranks: int,
) -> list[Tensor]:
    """The gradients of q, k and v, and, if wanted, of g and of the initial state; `from_zero`:
    there are no ranks and was no initial state."""
    given = _inputs(q, k, v, g, scale, want_gate)
    plan = _plan(given, want_final, ranks)
    x = plan.stages.prepare(given, from_zero)
    call = _called(plan, q, v, backward=True)
    d_o = torch.zeros_like(x.v) if d_o is None else d_o.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    (dq, dk, dv, dg), d_initial = backward(plan, call, x, tuple(saved), d_o, d_final, want_initial)
    assert dq is not None and dk is not None and dv is not None
    others = (None if dg is None else dg.contiguous(), d_initial)
    return [dq, dk, dv, *[tensor for tensor in others if tensor is not None]]


@decay_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    saved: list[Tensor],
    d_o: Tensor | None,
    d_final: Tensor | None,
    scale: float,
    from_zero: bool,
    want_gate: bool,
    want_initial: bool,
    want_final: bool,
    ranks: int,
) -> list[Tensor]:
    wanted = [q, k, v, *([g] if want_gate and g is not None else []), *(saved[:1] if want_initial else [])]
    return [tensor.new_empty(tensor.shape) for tensor in wanted]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, g, initial, ctx.scale, _, ctx.want_final, ctx.ranks = inputs
    ctx.ends_with_final = ctx.want_final and ctx.ranks != ALONE
    ctx.from_zero = initial is None and ctx.ranks == ALONE
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, *(output[1:-1] if ctx.ends_with_final else output[1:]))


def _backward(ctx: Any, d_output: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    q, k, v, g, *saved = ctx.saved_tensors
    want_gate, want_initial = ctx.needs_input_grad[3:5]
    d_final = d_output[-1] if ctx.ends_with_final else d_output[1] if ctx.ranks == ALONE else None
    dq, dk, dv, *others = decay_backward(
        q, k, v, g, saved, d_output[0], d_final, ctx.scale, ctx.from_zero, want_gate, want_initial,
        ctx.want_final, ctx.ranks,
    )  # fmt: skip
    dg, d_initial = others.pop(0) if want_gate else None, others.pop() if want_initial else None
    return dq, dk, dv, dg, d_initial, None, None, None, None


decay_forward.register_autograd(_backward, setup_context=_keep)
