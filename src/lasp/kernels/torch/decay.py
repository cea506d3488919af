"""The decay family in chunks, in plain PyTorch: any device, any dtype.

Legend: B batch, H heads, N chunks, C tokens a chunk, K and V head dims, G = 1 (decay per head) or K (per channel).
    g      [B, H, N, C, G]   log-decay of each token
    starts [B, H, N, K, V]   state at the start of each chunk
    ends   [B, H, N, K, V]   gradient of the state at the end of each chunk
    exp(i<j)                 decay of everything after token j up to token i, i's own included
Within a chunk, tokens see each other through scores[i, j] = sum_K q_i k_j exp(i<j), j <= i; across chunks they meet in
the state. Decays appear only as exponentials of sums of gates, in fp64, never of differences of sums: nothing overflows
at any length, and a fast gate costs slow ones beside it no digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp.algebra import Diagonal, Identity, Scalar, Summary, Transition
from lasp.kernels.torch.chunks import Chunking, chunk_size
from lasp.recurrence.inputs import DecayInputs, as_given, state_dtype, state_shape, transition
from lasp.recurrence.stages import Saved, Stages

CHUNK = 64
# Per-channel scores cost C passes over [T, K], so that short chunks are faster.
CHUNK_PER_CHANNEL = 16


class Chunks(NamedTuple):
    """A run cut into chunks. Padding neither decays nor adds anything.

    from_start, to_end: sums of g from the chunk's start to each token, and of those after it; None without decay.
    """

    chunking: Chunking
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    from_start: Tensor | None
    to_end: Tensor | None


def _chunks(x: DecayInputs) -> Chunks:
    limit = CHUNK_PER_CHANNEL if x.g is not None and x.g.dim() == 4 else CHUNK
    tokens, dtype = x.q.shape[1], state_dtype(x.q.dtype)
    chunking = Chunking(tokens, chunk_size(limit, tokens, x.documents), x.documents)
    q, k, v = (chunking.cut(tensor.to(dtype)) for tensor in (x.q, x.k, x.v))
    if x.g is None:
        return Chunks(chunking, q, k, v, None, None, None)
    g = x.g.to(torch.float64)
    # Padding must not decay: a constant is laid out per token only where some chunk is padded.
    if g.dim() == 1 and not chunking.is_padded:
        g = g[None, :, None, None, None].expand(-1, -1, -1, chunking.size, -1)
    else:
        g = g.expand(1, tokens, -1) if g.dim() == 1 else g
        g = chunking.cut(g if g.dim() == 4 else g[..., None])
    later = torch.cat([g[..., 1:, :], torch.zeros_like(g[..., :1, :])], 3)
    return Chunks(chunking, q, k, v, g, g.cumsum(3), later.flip(3).cumsum(3).flip(3))


def _exp(log: Tensor, like: Tensor) -> Tensor:
    return log.to(like.dtype).exp()


def _from_start(c: Chunks, tensor: Tensor) -> Tensor:
    """`tensor` [.., C, K] weighted by the decay from the chunk's start to each token."""
    return tensor if c.from_start is None else tensor * _exp(c.from_start, tensor)


def _to_end(c: Chunks, tensor: Tensor) -> Tensor:
    """`tensor` [.., C, K] weighted by the decay from each token to the chunk's end."""
    return tensor if c.to_end is None else tensor * _exp(c.to_end, tensor)


def _chunk_transitions(c: Chunks) -> Transition:
    """The chunks' transitions, stacked along a leading axis [N, B, H, ...], in fp64."""
    if c.from_start is None:
        return Identity()
    total = c.from_start[..., -1, :].expand(c.q.shape[0], -1, c.q.shape[2], -1).movedim(2, 0)
    return Diagonal(total) if total.shape[-1] > 1 else Scalar(total.squeeze(-1))


def _per_channel(c: Chunks) -> bool:
    return c.g is not None and c.g.shape[-1] > 1


def _pair_decay(c: Chunks) -> Tensor:
    """exp(i<j) for j <= i, zero above the diagonal; [.., C, C]. Decay per head only."""
    size = c.q.shape[3]
    if c.g is None:
        return torch.ones(size, size, dtype=c.q.dtype, device=c.q.device).tril()
    return _exp(c.g.expand(*c.g.shape[:-1], size).tril(-1).cumsum(3), c.q).tril()


def _column_decay(c: Chunks, j: int) -> Tensor:
    """exp(i<j) for i >= j, [.., C - j, K]."""
    assert c.g is not None
    return _exp(torch.cat([torch.zeros_like(c.g[..., :1, :]), c.g[..., j + 1 :, :]], 3).cumsum(3), c.q)


def _scores(c: Chunks) -> Tensor:
    """sum_K q_i k_j exp(i<j), [.., C, C], zero for j > i."""
    if not _per_channel(c):
        return (c.q @ c.k.mT) * _pair_decay(c)
    scores = c.q.new_zeros(*c.q.shape[:-1], c.q.shape[3])
    for j in range(c.q.shape[3]):
        scores[..., j:, j] = (c.q[..., j:, :] * c.k[..., j : j + 1, :] * _column_decay(c, j)).sum(-1)
    return scores


def _scores_gradient_q(c: Chunks, d_scores: Tensor) -> Tensor:
    if not _per_channel(c):
        return (d_scores * _pair_decay(c)) @ c.k
    dq = torch.zeros_like(c.q)
    for j in range(c.q.shape[3]):
        dq[..., j:, :] += d_scores[..., j:, j, None] * c.k[..., j : j + 1, :] * _column_decay(c, j)
    return dq


def _scores_gradient_k(c: Chunks, d_scores: Tensor) -> Tensor:
    if not _per_channel(c):
        return (d_scores * _pair_decay(c)).mT @ c.q
    dk = torch.empty_like(c.k)
    for j in range(c.q.shape[3]):
        dk[..., j, :] = (d_scores[..., j:, j, None] * c.q[..., j:, :] * _column_decay(c, j)).sum(-2)
    return dk


def _scores_gradient_decay(c: Chunks, d_scores: Tensor) -> Tensor:
    """Sum what pairs of tokens on either side of a decay contribute to its gradient; [.., C, G]."""
    size = c.q.shape[3]
    if not _per_channel(c):
        pairs = d_scores * _scores(c)
        return pairs.tril(-1).flip(3).cumsum(3).flip(3).tril(-1).sum(-1, keepdim=True)
    d_g = torch.zeros_like(c.q)
    for j in range(size - 1):
        pairs = d_scores[..., j + 1 :, j, None] * c.q[..., j + 1 :, :] * c.k[..., j : j + 1, :]
        d_g[..., j + 1 :, :] += (pairs * _column_decay(c, j)[..., 1:, :]).flip(3).cumsum(3).flip(3)
    return d_g


def _zeros(x: DecayInputs) -> Tensor:
    return x.q.new_zeros(state_shape(x), dtype=state_dtype(x.q.dtype))


def summarize(x: DecayInputs) -> tuple[Summary, tuple[Chunks, Summary]]:
    c = _chunks(x)
    runs = Summary(_chunk_transitions(c), (_to_end(c, c.k).mT @ c.v).movedim(2, 0))
    _, state = c.chunking.scan(runs, _zeros(x))
    return Summary(transition(x), state), (c, runs)


def local_outputs(x: DecayInputs, totals: tuple[Chunks, Summary]) -> Tensor:
    c, _ = totals
    return _scores(c) @ c.v


def outputs(x: DecayInputs, totals: tuple[Chunks, Summary], partial: Tensor, state_in: Tensor) -> tuple[Tensor, Saved]:
    c, runs = totals
    starts, _ = c.chunking.scan(runs, state_in)
    o = x.scale * (partial + _from_start(c, c.q) @ starts)
    return c.chunking.join(o).to(x.v.dtype), (starts,)


def summarize_adjoint(x: DecayInputs, saved: Saved, d_o: Tensor) -> tuple[Summary, tuple[Chunks, Tensor, Summary]]:
    c = _chunks(x)
    d_out = x.scale * c.chunking.cut(d_o.to(c.q.dtype))
    runs = Summary(_chunk_transitions(c), (_from_start(c, c.q).mT @ d_out).movedim(2, 0))
    _, d_state = c.chunking.scan(runs, _zeros(x), reverse=True)
    return Summary(transition(x).adjoint(), d_state), (c, d_out, runs)


def local_gradients(
    x: DecayInputs, saved: Saved, totals_adjoint: tuple[Chunks, Tensor, Summary], d_o: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (c, d_out, _), (starts,) = totals_adjoint, saved
    d_scores = d_out @ c.v.mT
    from_state = _from_start(c, d_out @ starts.mT)
    return _scores_gradient_q(c, d_scores) + from_state, d_scores, from_state


def gradients(
    x: DecayInputs,
    saved: Saved,
    totals_adjoint: tuple[Chunks, Tensor, Summary],
    local: tuple[Tensor, Tensor, Tensor],
    d_o: Tensor,
    d_state_out: Tensor,
) -> tuple[Tensor | None, ...]:
    (c, d_out, runs), (starts,) = totals_adjoint, saved
    dq, d_scores, dq_state = local
    ends, _ = c.chunking.scan(runs, d_state_out, reverse=True)
    dk_state = _to_end(c, c.v @ ends.mT)
    dk = _scores_gradient_k(c, d_scores) + dk_state
    dv = _scores(c).mT @ d_out + _to_end(c, c.k) @ ends
    dg = None
    if x.g is not None:
        across = runs.transition.apply((starts * ends).sum(-1, keepdim=True).movedim(2, 0)).movedim(0, 2)[..., 0]
        dg = _decay_gradient(x, c, c.q * dq_state, c.k * dk_state, across.to(dq.dtype), d_scores)
    joined = (c.chunking.join(d).to(t.dtype) for d, t in ((dq, x.q), (dk, x.k), (dv, x.v)))
    return (*joined, dg)


def _decay_gradient(
    x: DecayInputs, c: Chunks, from_start: Tensor, to_end: Tensor, across: Tensor, d_scores: Tensor
) -> Tensor:
    """The gradient of g: at each token, the sum over everything that its decay passes on.

    That is what reaches later tokens from before the chunk (`from_start`, [.., C, K], by receiver), what reaches the
    chunk's end from earlier tokens (`to_end`, by sender), what crosses the whole chunk (`across`, [.., K]), and pairs
    inside the chunk. The shorter identity q dq - k dk, summed, cancels what does not cross: it loses digits where
    decays are fast.
    """
    assert x.g is not None
    if not _per_channel(c):
        from_start, to_end = from_start.sum(-1, keepdim=True), to_end.sum(-1, keepdim=True)
        across = across.sum(-1, keepdim=True)
    before = torch.cat([torch.zeros_like(to_end[..., :1, :]), to_end[..., :-1, :]], 3).cumsum(3)
    after = from_start.flip(3).cumsum(3).flip(3)
    d_g = after + before + across[..., None, :] + _scores_gradient_decay(c, d_scores)
    d_g = c.chunking.join(d_g)
    if x.g.dim() == 4:
        return d_g
    return d_g.squeeze(-1) if x.g.dim() == 3 else d_g.squeeze(-1).sum((0, 1))


STAGES = Stages(
    prepare=as_given,
    summarize=summarize,
    local_outputs=local_outputs,
    outputs=outputs,
    summarize_adjoint=summarize_adjoint,
    local_gradients=local_gradients,
    gradients=gradients,
)
