"""The delta family by flash-linear-attention's kernels (fla.ops, 0.6.0), cut at the seam where states cross ranks.

Its kernels come in the same order as the stages: solve each chunk's triangular system (w, u), carry the state over
chunks, form the outputs. An operator of its own runs them in one go from a given initial state; here the state is
carried twice, once for the summary, from zero and from the identity side by side, and once from what the other
ranks sent. Everything else runs once forward and once more, for its intermediates, backward, as in its own operator.

Legend, as in fla: w, u with writes u - w S, A the inverse of the triangular system, h the states at chunk starts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.algebra import Dense, Summary
from lasp.kernels.fla.library import Kernels, kernels, refuse
from lasp.recurrence.inputs import DeltaInputs, num_states, state_shape
from lasp.recurrence.stages import Saved, Stages, as_given

CHUNK = 64
# Its gates are logarithms to base 2.
LOG2_E = 1.4426950408889634


class Solved(NamedTuple):
    """A run with its chunks' systems solved.

    Attributes:
        x: the inputs, contiguous, q and k in the values' dtype.
        common: keywords of all kernels: the chunk length, and `cu_seqlens` where documents are packed.
        gate: keyword of the kernels: `g` [B, T, H_v] or `gk` [B, T, H_v, K], accumulated in each chunk; empty
            without gates.
        q, k: as the state kernels take them: per channel, with the decay from the chunk's start and to its end.
        w, u, inverse: see above.
        scores: per channel only, queries against keys within the chunk.
    """

    x: DeltaInputs
    common: dict[str, Any]
    gate: dict[str, Tensor]
    q: Tensor
    k: Tensor
    w: Tensor
    u: Tensor
    inverse: Tensor
    scores: Tensor | None


class FlaAdjoint(NamedTuple):
    """The solved run, the gradient of its outputs, and of its writes so far as it comes from these."""

    solved: Solved
    d_o: Tensor
    d_writes: Tensor


def _solve(fla: Kernels, run: DeltaInputs) -> Solved:
    dtype = run.v.dtype
    x = run._replace(
        q=run.q.to(dtype).contiguous(),
        k=run.k.to(dtype).contiguous(),
        v=run.v.contiguous(),
        beta=run.beta.contiguous(),
        g=None if run.g is None else run.g.contiguous(),
    )
    common: dict[str, Any] = {"chunk_size": CHUNK}
    if x.documents is not None:
        common["cu_seqlens"] = torch.tensor(x.documents.bounds, dtype=torch.int64, device=x.v.device)
    gate: dict[str, Tensor] = {}
    if x.g is not None:
        accumulated = fla.cumsum.chunk_local_cumsum(x.g, scale=LOG2_E, **common)
        gate = {"g" if x.g.dim() == 3 else "gk": accumulated}
    if "gk" not in gate:
        w, u, inverse = fla.gated_solve.chunk_gated_delta_rule_fwd_intra(k=x.k, v=x.v, beta=x.beta, **gate, **common)
        return Solved(x, common, gate, x.q, x.k, w, u, inverse, None)
    w, u, q, k, scores, inverse = fla.channel_solve.chunk_kda_fwd_intra(
        q=x.q, k=x.k, v=x.v, beta=x.beta, scale=x.scale, disable_recompute=True, **gate, **common
    )
    return Solved(x, common, gate, q, k, w, u, inverse, scores)


def _carry(fla: Kernels, s: Solved, u: Tensor, initial: Tensor, **options: bool) -> tuple[Tensor, Any, Any]:
    """States at chunk starts, writes, and (where asked for) the state at the end, from `initial`."""
    result: tuple[Tensor, Any, Any] = fla.states.chunk_gated_delta_rule_fwd_h(
        k=s.k, w=s.w, u=u, initial_state=initial.contiguous(), **s.gate, **s.common, **options
    )
    return result


def _carry_back(
    fla: Kernels, a: FlaAdjoint, state_in: Tensor, d_state_out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the states at chunk ends, of the entering state (of which it needs the shape) and of the writes."""
    s = a.solved
    result: tuple[Tensor, Tensor, Tensor] = fla.states.chunk_gated_delta_rule_bwd_dhu(
        q=s.q,
        k=s.k,
        w=s.w,
        do=a.d_o,
        dv=a.d_writes,
        h0=state_in,
        dht=d_state_out,
        scale=s.x.scale,
        **s.gate,
        **s.common,
    )
    return result


def _identity(x: DeltaInputs) -> Tensor:
    """The identity's columns as the state of every sequence, or document, [N, H_v, K, K]."""
    keys = x.k.shape[3]
    eye = torch.eye(keys, dtype=torch.float32, device=x.v.device)
    return eye.expand(num_states(x), x.v.shape[2], keys, keys)


def _nothing(x: DeltaInputs) -> Summary:
    """The summary of a run without tokens, for which no kernel is launched."""
    zero = torch.zeros(state_shape(x), dtype=torch.float32, device=x.v.device)
    return Summary(Dense(_identity(x).contiguous()), zero)


def summarize(x: DeltaInputs) -> tuple[Summary, Solved | None]:
    refuse(x.v, x.q.shape[-1], None if x.g is None else x.g.dim())
    fla = kernels()
    if x.q.shape[1] == 0:
        return _nothing(x), None
    s = _solve(fla, x)
    keys, values = x.k.shape[3], x.v.shape[3]
    u, initial = pad(s.u, (0, keys)), pad(_identity(x), (values, 0))
    _, _, end = _carry(fla, s, u, initial, output_final_state=True, save_new_value=False)
    state, matrix = end.split([values, keys], -1)
    return Summary(Dense(matrix.contiguous()), state.contiguous()), s


def local_outputs(x: DeltaInputs, totals: Solved | None) -> None:
    return None


def outputs(x: DeltaInputs, totals: Solved | None, partial: None, state_in: Tensor) -> tuple[Tensor, Saved]:
    if totals is None:
        return x.v.clone(), (state_in,)
    fla, s = kernels(), totals
    h, writes, _ = _carry(fla, s, s.u, state_in)
    if s.scores is None:
        o = fla.outputs.chunk_fwd_o(q=s.x.q, k=s.x.k, v=writes, h=h, scale=x.scale, **s.gate, **s.common)
    else:
        o = fla.gla.chunk_gla_fwd_o_gk(q=s.x.q, v=writes, g=s.gate["gk"], A=s.scores, h=h, scale=x.scale, **s.common)
    return o, (state_in,)


def summarize_adjoint(x: DeltaInputs, saved: Saved, d_o: Tensor) -> tuple[Summary, FlaAdjoint | None]:
    if x.q.shape[1] == 0:
        return _nothing(x), None
    fla = kernels()
    s = _solve(fla, x)
    d_o = d_o.to(x.v.dtype).contiguous()
    # The run's transition once more, this time alone.
    no_writes = s.u.new_zeros(*s.u.shape[:-1], x.k.shape[3])
    _, _, matrix = _carry(fla, s, no_writes, _identity(x), output_final_state=True, save_new_value=False)
    inside = s.gate if s.scores is None else {"A": s.scores}
    d_writes = fla.outputs.chunk_bwd_dv_local(q=s.x.q, k=s.x.k, do=d_o, scale=x.scale, **inside, **s.common)
    adjoint = FlaAdjoint(s, d_o, d_writes)
    zero = torch.zeros(state_shape(x), dtype=torch.float32, device=x.v.device)
    _, d_state, _ = _carry_back(fla, adjoint, zero, None)
    return Summary(Dense(matrix.mT.contiguous()), d_state), adjoint


def local_gradients(
    x: DeltaInputs, saved: Saved, totals_adjoint: FlaAdjoint | None, d_o: Tensor
) -> tuple[Tensor, Tensor] | None:
    if totals_adjoint is None:
        return None
    s = totals_adjoint.solved
    h, writes, _ = _carry(kernels(), s, s.u, saved[0])
    return h, writes


def gradients(
    x: DeltaInputs,
    saved: Saved,
    totals_adjoint: FlaAdjoint | None,
    local: tuple[Tensor, Tensor] | None,
    d_o: Tensor,
    d_state_out: Tensor,
) -> tuple[Tensor | None, ...]:
    given = x.tensors()
    if totals_adjoint is None or local is None:
        return tuple(None if t is None else torch.zeros_like(t) for t in given)
    fla, a = kernels(), totals_adjoint
    d_h, _, d_u = _carry_back(fla, a, saved[0], d_state_out.contiguous())
    differentiate = _per_head if a.solved.scores is None else _per_channel
    found = differentiate(fla, a, *local, d_h, d_u)
    return tuple(None if t is None or d is None else d.to(t.dtype) for t, d in zip(given, found, strict=True))


def _per_head(
    fla: Kernels, a: FlaAdjoint, h: Tensor, writes: Tensor, d_h: Tensor, d_u: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta and g, without gates or with one per head."""
    s, x = a.solved, a.solved.x
    d_q, d_k, d_w, d_g = fla.outputs.chunk_bwd_dqkwg(
        q=x.q, k=x.k, v=writes, w=s.w, h=h, dv=d_u, do=a.d_o, dh=d_h, scale=x.scale, **s.gate, **s.common
    )
    packing = {name: value for name, value in s.common.items() if name != "chunk_size"}
    d_k_solve, d_v, d_beta, d_g_solve = fla.gated.prepare_wy_repr_bwd(
        k=x.k, v=x.v, beta=x.beta, A=s.inverse, dw=d_w, du=d_u, **s.gate, **packing
    )
    if s.gate:
        d_g = fla.cumsum.chunk_local_cumsum(d_g + d_g_solve, reverse=True, **s.common)
    return d_q, d_k + d_k_solve, d_v, d_beta, d_g


def _per_channel(
    fla: Kernels, a: FlaAdjoint, h: Tensor, writes: Tensor, d_h: Tensor, d_u: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta and g, with a gate per channel."""
    s, x, g = a.solved, a.solved.x, a.solved.gate["gk"]
    d_scores, _ = fla.channel_gradients.chunk_kda_bwd_dAv(
        q=x.q, k=x.k, v=writes, do=a.d_o, A=s.scores, scale=x.scale, **s.common
    )
    d_q, d_k, d_v, d_beta, d_g, d_inverse = fla.channel_gradients.chunk_kda_bwd_wy_dqkg_fused(
        q=x.q, k=x.k, v=x.v, v_new=writes, g=g, beta=x.beta, A=s.inverse, h=h, do=a.d_o, dh=d_h, dv=d_u,
        scale=x.scale, **s.common,
    )  # fmt: skip
    d_q, d_k, d_beta, d_g = fla.channel_solve.chunk_kda_bwd_intra(
        q=x.q, k=x.k, g=g, beta=x.beta, dAqk=d_scores, dAkk=d_inverse, dq=d_q, dk=d_k, db=d_beta, dg=d_g, **s.common
    )
    d_g = fla.cumsum.chunk_local_cumsum(d_g, reverse=True, **s.common)
    heads, groups = x.q.shape[2], x.v.shape[2] // x.q.shape[2]
    d_q, d_k = (d.unflatten(2, (heads, groups)).sum(3) for d in (d_q, d_k))
    return d_q, d_k, d_v, d_beta, d_g


STAGES = Stages(
    prepare=as_given,
    summarize=summarize,
    local_outputs=local_outputs,
    outputs=outputs,
    summarize_adjoint=summarize_adjoint,
    local_gradients=local_gradients,
    gradients=gradients,
    grouped_heads=True,
    traceable=False,
)
