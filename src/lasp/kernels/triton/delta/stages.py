"""The delta rule's stages on a GPU (contract: `lasp.recurrence.stages`).

Kept for backward: A, u and what enters a segment and happens to it there, with other ranks' part applied.
"""

from __future__ import annotations

from torch import Tensor

from lasp.algebra import Dense, Summary
from lasp.kernels.triton.common.launch import use_scratch
from lasp.kernels.triton.delta import run
from lasp.kernels.triton.delta.launches import launches_of
from lasp.kernels.triton.delta.run import (
    ChannelKeys,
    DeltaChunks,
    DeltaQueries,
    DeltaRun,
    DeltaSaved,
    DeltaSegments,
)
from lasp.recurrence.inputs import DeltaInputs
from lasp.recurrence.stages import Gradients, Saved, Stages, Unsummarized


def prepare(x: DeltaInputs, alone: bool) -> DeltaRun:
    """x as the kernels take it.

    alone: x is the whole sequence and starts from no state.

    Raises:
        ValueError: the kernels do not take such tensors.
    """
    work = launches_of(x, alone)
    use_scratch()
    q, k, v = (t.to(work.operand).contiguous() for t in (x.q, x.k, x.v))
    beta, g = x.beta.contiguous(), None if x.g is None else x.g.contiguous()
    return DeltaRun(q, k, v, beta, g, work)


def _summary(x: DeltaRun, added: Tensor, moves: Tensor, *, reverse: bool) -> Summary:
    """Summary of the run: its map of the state, or of the state's gradient."""
    _, state = run.scanned(x, added, moves, None, leaves=True, reverse=reverse)
    return Summary(Dense(run.transition_of(x, moves, reverse=reverse)), state)


def summarize(x: DeltaRun) -> tuple[Summary, DeltaSegments]:
    segments = run.totals(x, summarized=True)
    assert segments.added is not None and segments.moves is not None
    return _summary(x, segments.added, segments.moves, reverse=False), segments


def totals(x: DeltaRun) -> DeltaSegments:
    """Segments' maps of the state; none where runs are single segments."""
    return run.totals(x, summarized=False)


def local_outputs(x: DeltaRun, segments: DeltaSegments) -> DeltaQueries:
    return run.queries_made(x, segments)


def outputs(
    x: DeltaRun, segments: DeltaSegments, queries: DeltaQueries, state_in: Tensor | None
) -> tuple[Tensor, Saved]:
    """state_in is zero if None."""
    o, saved = run.outputs(x, segments, queries, None if state_in is None else state_in.contiguous())
    return o.to(x.work.dtype), _flat(saved)


def summarize_adjoint(x: DeltaRun, saved: Saved, d_o: Tensor) -> tuple[Summary, Tensor]:
    kept = _unflat(saved)
    use_scratch()  # backward passes have threads of their own
    added = run.totals_adjoint(x, kept, _d_o(x, d_o), summarized=True)
    assert added is not None
    # Of single segments forward makes none: only an initial state's gradient wants it.
    moves = run.summaries(x, kept.chunks)[1] if kept.moves is None else kept.moves
    return _summary(x, added, moves, reverse=True), added


def totals_adjoint(x: DeltaRun, saved: Saved, d_o: Tensor) -> Tensor | None:
    """Segments' sums of the state's gradient; None where runs are single segments."""
    use_scratch()
    return run.totals_adjoint(x, _unflat(saved), _d_o(x, d_o), summarized=False)


def _d_o(x: DeltaRun, d_o: Tensor) -> Tensor:
    return d_o.to(x.work.operand).contiguous()


def local_gradients(x: DeltaRun, saved: Saved, added: Tensor | None, d_o: Tensor) -> None:
    """Give nothing: what needs no other rank is made with what does."""


def gradients(
    x: DeltaRun, saved: Saved, added: Tensor | None, local: None, d_o: Tensor, d_state_out: Tensor | None
) -> Gradients:
    """d_state_out is zero if None."""
    work = x.work
    d_state_out = None if d_state_out is None else d_state_out.contiguous()
    dq, dk, dv, d_beta, dg = run.gradients(x, _unflat(saved), added, _d_o(x, d_o), d_state_out)
    return dq.to(work.dtype), dk.to(work.dtype), dv.to(work.dtype), d_beta, dg


def _leaving(saved: Saved) -> Tensor:
    return saved[0]


def _flat(saved: DeltaSaved) -> Saved:
    """All tensors of `saved`, the state that leaves the run first; empty ones for what there is not."""
    chunks, queries = saved.chunks, saved.queries
    channels = (None,) * 4 if chunks.channels is None else tuple(chunks.channels)
    gates = (*chunks.gates, None, None)[:2]
    optional = (saved.entering, saved.moves, *gates, chunks.k_norms, *channels, queries.norms, queries.scores)
    none = saved.leaving.new_empty(0)
    return (
        saved.leaving, saved.u, chunks.inverse, chunks.betas, queries.q,
        *(none if tensor is None else tensor for tensor in optional),
    )  # fmt: skip


def _unflat(saved: Saved) -> DeltaSaved:
    leaving, u, inverse, betas, q = saved[:5]
    entering, moves, prefix, suffix, k_norms, *channels, q_norms, scores = (
        None if tensor.dim() == 1 else tensor for tensor in saved[5:]
    )
    gates = tuple(gate for gate in (prefix, suffix) if gate is not None)
    keys = None if channels[0] is None else ChannelKeys(*channels)  # type: ignore[arg-type]
    chunks = DeltaChunks(inverse, betas, gates, k_norms, keys)
    return DeltaSaved(leaving, u, entering, moves, chunks, DeltaQueries(q, q_norms, scores))


STAGES = Stages(
    prepare=prepare,
    summarize=summarize,
    local_outputs=local_outputs,
    outputs=outputs,
    summarize_adjoint=summarize_adjoint,
    local_gradients=local_gradients,
    gradients=gradients,
    unsummarized=Unsummarized(totals, totals_adjoint, _leaving),
    grouped_heads=True,
    takes_no_state=True,
    traceable=False,
    bad_gates_give_nan=True,
    normalizes=True,
)
