"""Scans as operators of PyTorch's, which torch.compile puts into its graphs without looking inside.

For stages that are fused kernels: of the delta rule where a beta is given, else of a decay. The operators know the
ranks by a number, and packed documents by a tensor, best on the host, whose numbers they read when they run: a graph is
for any documents. What the forward pass saves it gives as bytes (`lasp.recurrence.kept`).
"""

# No postponed annotations: the operators' schemas are read from them.
from typing import Any

import torch
from torch import Tensor

from lasp.exchange.start import ALONE, SequenceCall, ranks_of
from lasp.kernels.select import load
from lasp.ops.scan import ScanPlan, backward, begin, forward
from lasp.recurrence.documents import Documents, documents_here
from lasp.recurrence.inputs import DecayInputs, DeltaInputs, Inputs
from lasp.recurrence.kept import is_known, kept, kept_like, restored
from lasp.recurrence.stages import AnyStages
from lasp.sequence import SequenceParallel
from lasp.sequence.sequence_parallel import broadcast_errors
from lasp.sequence.shards import document_bounds, document_digest


def scan_operator(plan: ScanPlan, x: Inputs, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Compute outputs and the final state inside a compiled region: `lasp.ops.autograd.scan` as operators."""
    ranks = ALONE if plan.ranks is None else plan.ranks.key
    beta, erase_key, log_weight, skip, normalize = None, None, None, None, False
    if isinstance(x, DeltaInputs):
        beta, erase_key, normalize = x.beta, x.erase_key, x.normalize
    elif isinstance(x, DecayInputs):
        log_weight, skip = x.log_weight, x.skip
    # Weights' gradients come with the gate's.
    want_gate = x.g is not None and (x.g.requires_grad or log_weight is not None)
    sized = plan.cu_seqlens is None and is_known(*x.v.shape[:2])
    o, *others = scan_forward(
        x.q, x.k, x.v, beta, x.g, erase_key, log_weight, skip, plan.cu_seqlens, initial, x.scale, normalize, want_gate,
        plan.want_final, ranks, sized,
    )  # fmt: skip
    return o, others[0] if plan.want_final else None


def _stages(x: Inputs) -> AnyStages:
    return load("delta" if isinstance(x, DeltaInputs) else "decay", "triton", x)


def _ranks(key: int) -> SequenceParallel | None:
    return None if key == ALONE else ranks_of(key)  # type: ignore[return-value]


def _plan(x: Inputs, want_final: bool, key: int) -> ScanPlan:
    operator = "delta_rule" if isinstance(x, DeltaInputs) else "linear_attention"
    return ScanPlan(operator, _stages(x), _ranks(key), want_final, documents=x.documents)


def _called(plan: ScanPlan, x: Inputs, *, backward: bool = False) -> SequenceCall | None:
    """Tell the other ranks what is about to be computed."""
    if plan.ranks is None:
        return None
    state = (x.v.shape[0], x.v.shape[2], x.q.shape[3], x.v.shape[3])
    fields = {"pass": "backward" if backward else "forward", "state": state, "output_final_state": plan.want_final}
    if isinstance(x, DeltaInputs):
        fields |= {"normalize_qk": x.normalize, "erase_key": x.erase_key is not None}
    documents = None if x.documents is None else document_digest(x.documents.cu_seqlens)
    key = tuple(fields.values())
    return plan.ranks.call(f"compiled {plan.operator}", key, lambda: fields, documents, replays=not backward)


def _read(cu_seqlens: Tensor | None, v: Tensor, key: int) -> Documents | None:
    """Return the packed documents here. Raises ValueError if they are not the sequence's."""
    if cu_seqlens is None:
        return None
    ranks, tokens = _ranks(key), v.shape[1]
    total, offset = (tokens, 0) if ranks is None else (ranks.total(tokens), ranks.offset(tokens))
    with broadcast_errors(ranks):
        bounds = document_bounds(cu_seqlens, total, v.shape[0])
    return documents_here(bounds, offset, tokens)


def _wanted(g: Tensor | None, want_gate: bool) -> Tensor | None:
    """Return the gate, its gradient wanted or not, which launches go by."""
    return None if g is None else g.detach().requires_grad_(want_gate)


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    erase_key: Tensor | None,
    log_weight: Tensor | None,
    skip: Tensor | None,
    documents: Documents | None,
    scale: float,
    normalize: bool,
) -> Inputs:
    if beta is None:
        return DecayInputs(q, k, v, g, scale, documents, log_weight, skip)
    return DeltaInputs(q, k, v, beta, g, scale, documents, normalize, erase_key)


@torch.library.custom_op("lasp::scan_forward", mutates_args=())
def scan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    erase_key: Tensor | None,
    log_weight: Tensor | None,
    skip: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    scale: float,
    normalize: bool,
    want_gate: bool,
    want_final: bool,
    ranks: int,
    sized: bool,
) -> list[Tensor]:
    """o [B, T, H_v, V]; if wanted, the final state, [B, H_v, K, V] or one for each document of the whole sequence; and
    what `scan_backward` takes as `saved`.

    ranks: the key of the ranks that share the sequence, or ALONE. sized: how that is kept (`lasp.recurrence.kept`).
    """
    documents = _read(cu_seqlens, v, ranks)
    given = _inputs(q, k, v, beta, _wanted(g, want_gate), erase_key, log_weight, skip, documents, scale, normalize)
    plan = _plan(given, want_final, ranks)
    x = plan.stages.prepare(given, initial is None and ranks == ALONE)
    initial = None if initial is None else initial.contiguous()
    with torch.autocast(v.device.type, enabled=False):
        o, final, saved = forward(plan, begin(plan, _called(plan, given), x, initial), x, initial)
    # An exchange may give back its input, and stages may keep it; an operator must not.
    own = None if initial is None else initial.untyped_storage().data_ptr()
    saved = tuple(t.clone() if t.untyped_storage().data_ptr() == own else t for t in saved)
    return [o, *([final.clone()] if final is not None else []), *kept(saved, plan.stages.most_saved, sized=sized)]


@scan_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    erase_key: Tensor | None,
    log_weight: Tensor | None,
    skip: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    scale: float,
    normalize: bool,
    want_gate: bool,
    want_final: bool,
    ranks: int,
    sized: bool,
) -> list[Tensor]:
    given = _inputs(q, k, v, beta, g, erase_key, log_weight, skip, None, scale, normalize)
    stages = _stages(given)
    final = [_state_like(q, v, cu_seqlens)] if want_final else []
    saved = None
    if sized:
        assert stages.empty_saved is not None
        saved = stages.empty_saved(given, initial is not None, ranks != ALONE, want_gate)
    return [v.new_empty(v.shape), *final, *kept_like(saved, v, stages.most_saved)]


def _state_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((count, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)


@torch.library.custom_op("lasp::scan_backward", mutates_args=())
def scan_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    erase_key: Tensor | None,
    log_weight: Tensor | None,
    skip: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    d_o: Tensor | None,
    d_final: Tensor | None,
    scale: float,
    normalize: bool,
    from_zero: bool,
    want_gate: bool,
    want_initial: bool,
    want_final: bool,
    ranks: int,
) -> list[Tensor]:
    """The gradients of q, k, v, beta, g (if wanted), erase key, weights and skips, if there are any, and, if wanted, of
    the initial state; `from_zero`: there are no ranks and was no initial state."""
    documents = _read(cu_seqlens, v, ranks)
    given = _inputs(q, k, v, beta, _wanted(g, want_gate), erase_key, log_weight, skip, documents, scale, normalize)
    plan = _plan(given, want_final, ranks)
    x = plan.stages.prepare(given, from_zero)
    call = _called(plan, given, backward=True)
    d_o = torch.zeros_like(v) if d_o is None else d_o.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    with torch.autocast(v.device.type, enabled=False):
        gradients, d_initial = backward(plan, call, x, restored(saved), d_o, d_final, want_initial)
    return [tensor.contiguous() for tensor in (*gradients, d_initial) if tensor is not None]


@scan_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    erase_key: Tensor | None,
    log_weight: Tensor | None,
    skip: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    d_o: Tensor | None,
    d_final: Tensor | None,
    scale: float,
    normalize: bool,
    from_zero: bool,
    want_gate: bool,
    want_initial: bool,
    want_final: bool,
    ranks: int,
) -> list[Tensor]:
    gate, initial = g if want_gate else None, _state_like(q, v, cu_seqlens) if want_initial else None
    wanted = [q, k, v, beta, gate, erase_key, log_weight, skip, initial]
    return [tensor.new_empty(tensor.shape) for tensor in wanted if tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, initial, ctx.scale, ctx.normalize, _, ctx.want_final, ctx.ranks, _ = inputs
    ctx.from_zero = initial is None and ctx.ranks == ALONE
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2 if ctx.want_final else 1 :])


def _backward(ctx: Any, d_output: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    q, k, v, beta, g, erase_key, log_weight, skip, cu_seqlens, *saved = ctx.saved_tensors
    want_gate, want_initial = ctx.needs_input_grad[4] or log_weight is not None, ctx.needs_input_grad[9]
    dq, dk, dv, *others = scan_backward(
        q, k, v, beta, g, erase_key, log_weight, skip, cu_seqlens, saved, d_output[0],
        d_output[1] if ctx.want_final else None, ctx.scale, ctx.normalize, ctx.from_zero, want_gate, want_initial,
        ctx.want_final, ctx.ranks,
    )  # fmt: skip
    weighs = log_weight is not None
    wanted = (beta is not None, want_gate, erase_key is not None, weighs, weighs, want_initial)
    *own, d_initial = (others.pop(0) if each else None for each in wanted)
    return dq, dk, dv, *own, None, d_initial, None, None, None, None, None, None


scan_forward.register_autograd(_backward, setup_context=_keep)
