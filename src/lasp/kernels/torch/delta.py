"""The delta family in chunks (the WY form), in plain PyTorch: any device, any dtype.

Legend: B batch, H heads, N chunks, C tokens a chunk, K and V head dims, G = 1 (decay per head) or K (per channel).
    S        [B, H, N, K, V]  state at the start of each chunk
    u        [B, H, N, C, V]  what each token writes: S_t = diag(exp(g_t)) S_{t-1} + k_t u_t^T
    r        [B, H, N, C, K]  erase key: what a token reads; k where none is given
    exp(i<j) decay of everything after token j up to token i, i's own included

A token writes what is missing from what it reads, u_t = beta_t (v_t - r_t diag(exp(g_t)) S_{t-1}), and the
state it reads holds the writes before it. Over a chunk that is a triangular system with unit diagonal,

    u_i + beta_i sum_{j<i} (r_i exp(i<j) k_j) u_j = beta_i (v_i - r_i exp(i<start) S),

whose solution is affine in the chunk's entering state: u = writes - erases S. Everything else follows by matrix
products: the chunk is S -> (diag(exp(end<start)) - stores^T erases) S + stores^T writes with stores_j =
k_j exp(end<j), and its outputs are partial + queries S. The system is solved by substitution, in fp32 or fp64: the
terms of an explicit series of its inverse grow where beta nears 2.

Decays appear only as exponentials of sums of gates, never of differences of sums: nothing overflows, and neither a
decay nor its gradient loses digits to cancellation. Backward recomputes the chunks. The scans and the products with
states are written out; PyTorch differentiates what depends on a chunk's own inputs alone (`_wy_factors`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.algebra import Dense, Summary, Transition
from lasp.kernels.torch.chunks import Chunking, chunk_size
from lasp.recurrence.inputs import DeltaInputs, as_given, state_dtype, state_shape
from lasp.recurrence.pullback import pull_back
from lasp.recurrence.stages import Saved, Stages

CHUNK = 64
# A chunk of many more tokens than channels erases most of what it writes: pairs of its tokens then cancel, and the
# gradient of a decay is what is left of them.
CHUNK_PER_CHANNEL = 4


class ChunkFactors(NamedTuple):
    """A chunk's quantities that depend on its own tokens only.

    Attributes:
        reads: [.., C, K], queries decayed from the chunk's start, times scale.
        scores: [.., C, C], query against key with the decay between them, times scale; zero for j > i.
        stores: [.., C, K], keys decayed to the chunk's end.
        writes: [.., C, V], u for a zero entering state.
        erases: [.., C, K], u = writes - erases S.
        kept: [.., G], decay over the chunk; None without gates.
    """

    reads: Tensor
    scores: Tensor
    stores: Tensor
    writes: Tensor
    erases: Tensor
    kept: Tensor | None


class Forward(NamedTuple):
    """`summarize`'s totals: the chunks, and the state at their starts as an affine map on the run's entering one."""

    chunking: Chunking
    chunks: ChunkFactors
    starts: Tensor
    prefixes: Tensor


class DeltaAdjoint(NamedTuple):
    """`summarize_adjoint`'s totals: the chunks as a function of their inputs, and the gradient of the state at their
    ends as an affine map on that of the run's leaving one."""

    chunking: Chunking
    inputs: list[Tensor]
    chunks: ChunkFactors
    d_out: Tensor
    ends: Tensor
    suffixes: Tensor


class DeltaLocalGradients(NamedTuple):
    """Results of `local_gradients`: the writes, and the part of their gradient that comes from the outputs."""

    writes: Tensor
    d_writes: Tensor
    d_reads: Tensor
    d_scores: Tensor


def _cut_inputs(x: DeltaInputs) -> tuple[Chunking, list[Tensor]]:
    """q, k, v, beta and g if there is one, in chunks. Padding neither decays nor writes."""
    tokens, channels = x.q.shape[1], x.q.shape[3]
    limit = min(CHUNK, CHUNK_PER_CHANNEL << (channels.bit_length() - 1))
    chunking = Chunking(tokens, chunk_size(limit, tokens, x.documents), x.documents)
    dtype = state_dtype(x.q.dtype)
    tensors = [t for t in x.tensors() if t is not None]
    return chunking, [chunking.cut((t if t.dim() == 4 else t[..., None]).to(dtype)) for t in tensors]


def _after(g: Tensor) -> Tensor:
    """Sum of the gates after each token, up to the chunk's end; [.., C, G]."""
    later = torch.cat([g[..., 1:, :], torch.zeros_like(g[..., :1, :])], -2)
    return later.flip(-2).cumsum(-2).flip(-2)


def _channel_scores(rows: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """rows_i exp(i<j) k_j for j <= i, [.., C, C], with a decay per channel.

    By halves: tokens of the second half see those of the first through the decay up to the middle and from there,
    a matrix product; within each half the same again. C is a power of two.
    """
    size = k.shape[-2]
    if size == 1:
        return (rows * k).sum(-1, keepdim=True)
    rows, k, g = (t.unflatten(-2, (2, size // 2)) for t in (rows, k, g))
    within = _channel_scores(rows, k, g)
    late = rows[..., 1, :, :] * g[..., 1, :, :].cumsum(-2).exp()
    early = k[..., 0, :, :] * _after(g[..., 0, :, :]).exp()
    across = late @ early.mT
    first = torch.cat([within[..., 0, :, :], torch.zeros_like(across)], -1)
    return torch.cat([first, torch.cat([across, within[..., 1, :, :]], -1)], -2)


def _wy_factors(x: DeltaInputs, inputs: list[Tensor]) -> ChunkFactors:
    """The chunks' quantities, of the run's inputs in chunks; see the head of this file."""
    q, k, v, beta, *others = inputs
    g = others[0] if x.g is not None else None
    r = others[-1] if x.erase_key is not None else k
    kept, reads, reading_keys, stores = None, q, r, k
    if g is None:
        scores, overlaps = (q @ k.mT).tril(), r @ k.mT
    else:
        from_start = g.cumsum(-2).exp()
        kept, reads, reading_keys = from_start[..., -1, :], q * from_start, r * from_start
        if g.shape[-1] == 1:
            # [i, j] = sum of the gates of j+1 .. i.
            spans = g.expand(*g.shape[:-1], g.shape[-2]).tril(-1).cumsum(-2)
            decay = spans.exp().tril()
            scores, overlaps = (q @ k.mT) * decay, (r @ k.mT) * decay
            stores = k * decay[..., -1:, :].mT
        else:
            scores, overlaps = _channel_scores(torch.stack([q, r]), k, g)
            stores = k * _after(g).exp()
    system, known = beta * overlaps.tril(-1), beta * torch.cat([v, reading_keys], -1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    writes, erases = solved.split([v.shape[-1], k.shape[-1]], -1)
    return ChunkFactors(x.scale * reads, x.scale * scores, stores, writes, erases, kept)


def _queries(c: ChunkFactors) -> Tensor:
    """[.., C, K], what each token's output takes from the chunk's entering state."""
    return c.reads - c.scores @ c.erases


@dataclass(frozen=True)
class _Chunk(Transition):
    """S -> kept S - erased S: what a chunk keeps of every channel, [..., 1 or K, 1] in fp64, and what it erases,
    [..., K, K]. Of their difference, one matrix, fp32 would lose the digits that a slow decay has."""

    kept: Tensor
    erased: Tensor

    def apply(self, state: Tensor) -> Tensor:
        return self.kept * state - self.erased @ state.to(self.erased.dtype)

    def adjoint(self) -> _Chunk:
        return _Chunk(self.kept, self.erased.mT)


def _transitions(c: ChunkFactors, inputs: list[Tensor]) -> _Chunk:
    """Transitions of each chunk's entering state, on a leading axis: [N, B, H, ...]."""
    erased = (c.stores.mT @ c.erases).movedim(2, 0)
    if c.kept is None:
        return _Chunk(erased.new_ones((*erased.shape[:-2], 1, 1), dtype=torch.float64), erased)
    return _Chunk(inputs[4].sum(-2, dtype=torch.float64).exp().movedim(2, 0)[..., None], erased)


def _scan(
    x: DeltaInputs, chunking: Chunking, transitions: _Chunk, added: Tensor, *, reverse: bool = False
) -> tuple[Summary, Tensor, Tensor]:
    """Chunks that add [B, H, N, K, V]: the run's summary, and the state that enters each chunk as offset + factor @
    (the state that enters its sequence or document).

    The factors are the same scan on the identity's columns.
    """
    count, heads, size, values = state_shape(x)
    eye = torch.eye(size, dtype=added.dtype, device=added.device).expand(count, heads, size, size)
    initial = torch.cat([added.new_zeros(count, heads, size, values), eye], -1)
    added = pad(added, (0, size))
    entering, end = chunking.scan(Summary(transitions, added.movedim(2, 0)), initial, reverse=reverse)
    offsets, factors = entering.split([values, size], -1)
    state, matrix = end.split([values, size], -1)
    return Summary(Dense(matrix.contiguous()), state.contiguous()), offsets, factors


def summarize(x: DeltaInputs) -> tuple[Summary, Forward]:
    chunking, inputs = _cut_inputs(x)
    c = _wy_factors(x, inputs)
    summary, starts, prefixes = _scan(x, chunking, _transitions(c, inputs), c.stores.mT @ c.writes)
    return summary, Forward(chunking, c, starts, prefixes)


def local_outputs(x: DeltaInputs, totals: Forward) -> tuple[Tensor, Tensor]:
    c = totals.chunks
    return c.scores @ c.writes, _queries(c)


def outputs(x: DeltaInputs, totals: Forward, partial: tuple[Tensor, Tensor], state_in: Tensor) -> tuple[Tensor, Saved]:
    starts = totals.starts + totals.prefixes @ totals.chunking.spread(state_in)
    o = partial[0] + partial[1] @ starts
    return totals.chunking.join(o).to(x.v.dtype), (starts,)


def summarize_adjoint(x: DeltaInputs, saved: Saved, d_o: Tensor) -> tuple[Summary, DeltaAdjoint]:
    chunking, cut = _cut_inputs(x)
    inputs = [t.detach().requires_grad_() for t in cut]
    with torch.enable_grad():
        c = _wy_factors(x, inputs)
    d_out = chunking.cut(d_o.to(c.reads.dtype))
    # Gradients flow from a chunk's end to its start, by the transposed transitions.
    transposed = _transitions(c, cut).adjoint()
    summary, ends, suffixes = _scan(x, chunking, transposed, _queries(c).mT @ d_out, reverse=True)
    return summary, DeltaAdjoint(chunking, inputs, c, d_out, ends, suffixes)


def local_gradients(x: DeltaInputs, saved: Saved, totals_adjoint: DeltaAdjoint, d_o: Tensor) -> DeltaLocalGradients:
    c, d_out, (starts,) = totals_adjoint.chunks, totals_adjoint.d_out, saved
    writes = c.writes - c.erases @ starts
    return DeltaLocalGradients(writes, c.scores.mT @ d_out, d_out @ starts.mT, d_out @ writes.mT)


def gradients(
    x: DeltaInputs,
    saved: Saved,
    totals_adjoint: DeltaAdjoint,
    local: DeltaLocalGradients,
    d_o: Tensor,
    d_state_out: Tensor,
) -> tuple[Tensor | None, ...]:
    (chunking, inputs, c, _, ends, suffixes), (starts,) = totals_adjoint, saved
    ends = ends + suffixes @ chunking.spread(d_state_out)
    d_writes = local.d_writes + c.stores @ ends
    d_chunks = [local.d_reads, local.d_scores, local.writes @ ends.mT, d_writes, -d_writes @ starts.mT]
    if c.kept is not None:
        d_kept = (starts * ends).sum(-1)
        d_chunks.append(d_kept if c.kept.shape[-1] > 1 else d_kept.sum(-1, keepdim=True))
    d_inputs = pull_back([t for t in c if t is not None], inputs, d_chunks)
    joined = [chunking.join(d) for d in d_inputs]
    given = [t for t in x.tensors() if t is not None]
    found: list[Tensor | None] = [d.reshape(t.shape).to(t.dtype) for d, t in zip(joined, given, strict=True)]
    return tuple(found if x.g is not None else [*found[:4], None, *found[4:]])


STAGES = Stages(
    prepare=as_given,
    summarize=summarize,
    local_outputs=local_outputs,
    outputs=outputs,
    summarize_adjoint=summarize_adjoint,
    local_gradients=local_gradients,
    gradients=gradients,
    traceable=False,
    erases=True,
)
