"""All stages at once, on one device or around an exchange: two functions, and what makes them differentiable.

Eager calls go through one autograd function, whose cost to the host decides how short a sequence is worth while.
torch.compile gets the same two functions as operators `lasp::decay_forward` and `lasp::decay_backward`, which it puts
into its graph without looking inside; they know the ranks by a number, and take no packed documents. Their lists end
with what backward keeps, whose number depends on the kind of decay.
"""

# No postponed annotations: the operators' schemas are read from them.
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.algebra import Summary
from lasp.kernels.triton.common.decays import TOKEN
from lasp.kernels.triton.common.launch import use_scratch
from lasp.kernels.triton.decay import stages
from lasp.kernels.triton.decay.channel import stages as channel
from lasp.kernels.triton.decay.launches import Launches, keeps_states, kind_of, per_channel, plan_of
from lasp.recurrence.across import Across, PendingState, of_key
from lasp.recurrence.derivatives import first_derivatives
from lasp.recurrence.documents import Documents
from lasp.recurrence.packed_documents import PackedDocuments, zero_finals
from lasp.recurrence.stages import DecayInputs

ALONE = -1


class Started(NamedTuple):
    """A run whose exchange has begun: what its segments add to the state, and the exchange."""

    totals: Any
    exchange: PendingState


def start(x: DecayInputs, initial: Tensor | None, want_final: bool, across: Across) -> Started:
    """Summarize the run and begin the exchange. q is not read: another tensor of its shape may stand for it."""
    initial = None if initial is None else initial.contiguous()
    with torch.no_grad():
        return _start(*stages.prepare(x), _packed(x, across), initial, want_final, across)


def _packed(x: DecayInputs, across: Across | None) -> PackedDocuments | None:
    return None if x.documents is None else PackedDocuments(x.documents, across)


def _start(
    x: DecayInputs,
    work: Launches,
    packed: PackedDocuments | None,
    initial: Tensor | None,
    want_final: bool,
    across: Across,
) -> Started:
    summary, totals = stages.totals_of(x, work, summarized=True)
    assert summary is not None
    if packed is not None:  # documents' final states are known where they end, without the exchange
        return Started(totals, across.begin(x, packed.leaving(summary, initial), None))
    return Started(totals, across.begin(x, summary, initial, want_total=want_final))


def _forward(
    x: DecayInputs,
    work: Launches,
    initial: Tensor | None,
    want_final: bool,
    across: Across | None,
    started: Started | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """o, the final state if it is wanted or there is one device, and what backward keeps: first the states that leave
    this rank's runs."""
    initial, packed = None if initial is None else initial.contiguous(), _packed(x, across)
    exchange = None
    if across is None:
        partial = stages.local_outputs_of(x, work)
        _, totals = stages.totals_of(x, work, partial, summarized=False)
    else:
        totals, exchange = started or _start(x, work, packed, initial, want_final, across)
        partial = stages.local_outputs_of(x, work)
    state_in, final = (initial, None) if exchange is None else exchange.wait()
    if packed is not None:
        state_in = packed.entering(state_in, initial)
    o, saved = stages.outputs_of(x, work, totals, partial, state_in)
    if x.v.numel() == 0:  # no kernel ran
        saved.leaving.zero_() if state_in is None else saved.leaving.copy_(state_in)
    kept = stages.saved_list(saved)
    if packed is not None:
        final = packed.final(saved.leaving, initial) if want_final else None
    elif across is None:
        final = saved.leaving
    return o, final, kept


def _backward(
    x: DecayInputs,
    work: Launches,
    kept: list[Tensor],
    d_o: Tensor | None,
    d_final: Tensor | None,
    want_initial: bool,
    want_final: bool,
    across: Across | None,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """The gradients of q, k, v and g, and, if wanted, of the initial state."""
    saved = stages.saved_of(work, kept)
    d_o = torch.zeros_like(x.v) if d_o is None else d_o.contiguous()
    d_final, packed = None if d_final is None else d_final.contiguous(), _packed(x, across)
    summarized = want_initial or across is not None
    summary, totals = stages.totals_adjoint_of(x, work, saved, d_o, summarized=summarized)
    exchange = None
    if across is not None:
        assert summary is not None
        if want_final:  # a rank's gradient of the final state is its share of it: the loss is the sum over ranks
            d_final = across.sum(zero_finals(x, summary) if d_final is None else d_final)
        border, before = (summary, d_final) if packed is None else (packed.leaving_adjoint(summary, d_final), None)
        exchange = across.begin(x, border, before, reverse=True)
    local = stages.local_gradients_of(x, work, saved, d_o)
    d_leaving = d_final if exchange is None else exchange.wait().entering
    if packed is not None:
        d_leaving = packed.entering_adjoint(d_leaving, d_final)
    gradients = stages.gradients_of(x, work, saved, totals, local, d_o, d_leaving)
    if not want_initial:
        return gradients, None
    assert summary is not None
    return gradients, _d_initial(summary, d_leaving, d_final, packed, across)


def _d_initial(
    summary: Summary,
    d_leaving: Tensor | None,
    d_final: Tensor | None,
    packed: PackedDocuments | None,
    across: Across | None,
) -> Tensor:
    """Whole on the first rank: the ranks' gradients are shares of one sum."""
    elsewhere = across is not None and across.rank > 0
    if packed is None and elsewhere:
        return torch.zeros_like(summary.state)
    d_entering = summary.state if d_leaving is None else summary.apply(d_leaving)
    if packed is None:
        return d_entering
    d_initial = packed.initial(d_entering, d_final)  # which the ranks find together
    return torch.zeros_like(d_initial) if elsewhere else d_initial


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
        documents: Documents | None,
        across: Across | None,
        started: Started | None,
    ) -> tuple[Tensor, Tensor | None]:
        x, work = stages.prepare(DecayInputs(q, k, v, g, scale, documents), initial is None and across is None)
        o, final, kept = _forward(x, work, initial, want_final, across, started)
        ctx.set_materialize_grads(False)
        ctx.work, ctx.want_final, ctx.documents, ctx.across = work, want_final, documents, across
        ctx.save_for_backward(x.q, x.k, x.v, x.g, *kept)
        return o, final if want_final else None

    @staticmethod
    @first_derivatives("linear_attention")
    def backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        use_scratch()
        # First of all, because this may recompute a region, with calls of its own.
        q, k, v, g, *kept = ctx.saved_tensors
        across = None if ctx.across is None else ctx.across.adjoint()
        x = DecayInputs(q, k, v, g, ctx.work.scale, ctx.documents)
        gradients, d_initial = _backward(
            x, ctx.work, kept, d_o, d_final, ctx.needs_input_grad[4], ctx.want_final, across
        )
        return *gradients, d_initial, None, None, None, None, None


def _ranks(key: int, state: tuple[int, ...], want_final: bool, *, backward: bool = False) -> Across | None:
    """Those of a compiled graph, told what they are about to compute."""
    if key == ALONE:
        return None
    fields = {"pass": "backward" if backward else "forward", "state": state, "output_final_state": want_final}
    across: Across = of_key(key).call(
        "compiled linear_attention", tuple(fields.values()), lambda: fields, replays=not backward
    )
    return across


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
    """o [B, T, H_v, V], the state [B, H_v, K, V] that leaves this rank, and what else `decay_backward` takes as `kept`.

    ranks: the key of the ranks that share the sequence, or ALONE; with ranks, the final state comes last if wanted.
    """
    g = None if g is None else g.detach().requires_grad_(want_gate)
    x, work = stages.prepare(DecayInputs(q, k, v, g, scale), initial is None and ranks == ALONE)
    across = _ranks(ranks, work.state, want_final)
    o, final, kept = _forward(x, work, initial, want_final, across)
    # An exchange may give back its input, an operator must not.
    return [o, *kept, *([final.clone()] if across is not None and want_final and final is not None else [])]


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
    from_zero = initial is None and ranks == ALONE
    return [*_empty_outputs(q, v, g, from_zero, want_gate), *(final if want_final and ranks != ALONE else [])]


def _empty_outputs(q: Tensor, v: Tensor, g: Tensor | None, from_zero: bool, want_gate: bool) -> list[Tensor]:
    (B, _, H_v, V), K, p = v.shape, q.shape[3], plan_of(q, v, g, from_zero)

    def state(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    results = [v.new_empty(v.shape), state(B, H_v, K, V)]
    if keeps_states(p, want_gate):
        results.append(state(B, H_v, p.segments, K, V))
    if per_channel(g):
        return [*results, *channel.empty_prepared(q, v, p)]
    if kind_of(g) == TOKEN.value:
        return [*results, *(state(B, H_v, p.chunks * p.chunk) for _ in range(p.num_gates))]
    return results


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
    want_final: bool,
    ranks: int,
) -> list[Tensor]:
    """The gradients of q, k and v, and, if wanted, of g and of the initial state; `from_zero`:
    there are no ranks and was no initial state."""
    g = None if g is None else g.detach().requires_grad_(want_gate)
    x, work = stages.prepare(DecayInputs(q, k, v, g, scale), from_zero)
    across = _ranks(ranks, work.state, want_final, backward=True)
    (dq, dk, dv, dg), d_initial = _backward(x, work, kept, d_o, d_final, want_initial, want_final, across)
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
    want_final: bool,
    ranks: int,
) -> list[Tensor]:
    wanted = [q, k, v, *([g] if want_gate and g is not None else []), *(kept[:1] if want_initial else [])]
    return [tensor.new_empty(tensor.shape) for tensor in wanted]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, g, initial, ctx.scale, _, ctx.want_final, ctx.ranks = inputs
    ctx.ends_with_final = ctx.want_final and ctx.ranks != ALONE
    ctx.from_zero = initial is None and ctx.ranks == ALONE
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, *(output[1:-1] if ctx.ends_with_final else output[1:]))


def _compiled_backward(ctx: Any, d_output: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    q, k, v, g, *kept = ctx.saved_tensors
    want_gate, want_initial = ctx.needs_input_grad[3:5]
    d_final = d_output[-1] if ctx.ends_with_final else d_output[1] if ctx.ranks == ALONE else None
    dq, dk, dv, *others = decay_backward(
        q, k, v, g, kept, d_output[0], d_final, ctx.scale, ctx.from_zero, want_gate, want_initial,
        ctx.want_final, ctx.ranks,
    )  # fmt: skip
    dg, d_initial = others.pop(0) if want_gate else None, others.pop() if want_initial else None
    return dq, dk, dv, dg, d_initial, None, None, None, None


decay_forward.register_autograd(_compiled_backward, setup_context=_keep)


def fused(
    x: DecayInputs,
    initial: Tensor | None,
    want_final: bool,
    across: Across | None,
    started: Started | None,
    key: int | None,
) -> tuple[Tensor, Tensor | None]:
    """o [B, T, H_v, V] and, if wanted, the final state [B, H_v, K, V] of the whole sequence, differentiable.

    Args:
        x: g in fp32. Packed documents only outside compiled graphs; initial and final states are then those of every
            document of the whole sequence, [documents, H_v, K, V].
        initial: [B, H_v, K, V], fp32; zero if None.
        across: the ranks that share the sequence, in this pass; None for one device and in compiled graphs.
        started: what `start` gave for the same run, or None.
        key: of the ranks in compiled graphs; None for one device.
    """
    if torch.compiler.is_compiling():
        assert x.documents is None
        ranks = ALONE if key is None else key
        want_gate = x.g is not None and x.g.requires_grad
        o, *others = decay_forward(x.q, x.k, x.v, x.g, initial, x.scale, want_gate, want_final, ranks)
        return o, (others[0] if key is None else others[-1]) if want_final else None
    result: tuple[Tensor, Tensor | None] = _Eager.apply(
        x.q, x.k, x.v, x.g, initial, x.scale, want_final, x.documents, across, started
    )
    return result
