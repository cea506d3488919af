"""The delta rule's stages on a GPU (contract: `lasp.recurrence.stages`).

Kept for backward: A, u and what enters a segment and happens to it there, with other ranks' part applied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.algebra import Dense, Summary
from lasp.kernels.triton.common.decays import TOKEN
from lasp.kernels.triton.common.launch import given
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
    launches = launches_of(x, alone, x.g is not None and x.g.requires_grad)
    q, k, v = (t.to(launches.operand).contiguous() for t in (x.q, x.k, x.v))
    beta, g = x.beta.contiguous(), None if x.g is None else x.g.contiguous()
    r = None if x.erase_key is None else x.erase_key.to(launches.operand).contiguous()
    return DeltaRun(q, k, v, beta, g, r, launches)


def _summary(x: DeltaRun, added: Tensor, moves: Tensor, *, reverse: bool) -> Summary:
    """Summary of the run: its map of the state, or of the state's gradient."""
    state, transition = run.run_of_segments(x, added, moves, reverse=reverse)
    return Summary(Dense(transition), state)


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
    return o.to(x.launches.dtype), _flat(x, saved)


def summarize_adjoint(x: DeltaRun, saved: Saved, d_o: Tensor) -> tuple[Summary, Tensor]:
    kept = _unflat(x, saved)
    added = run.totals_adjoint(x, kept, _d_o(x, d_o), summarized=True)
    assert added is not None
    # Of single segments forward makes none: only an initial state's gradient wants it.
    moves = run.summaries(x, kept.chunks)[1] if kept.moves is None else kept.moves
    return _summary(x, added, moves, reverse=True), added


def totals_adjoint(x: DeltaRun, saved: Saved, d_o: Tensor) -> Tensor | None:
    """Segments' sums of the state's gradient; None where runs are single segments."""
    return run.totals_adjoint(x, _unflat(x, saved), _d_o(x, d_o), summarized=False)


def _d_o(x: DeltaRun, d_o: Tensor) -> Tensor:
    return d_o.to(x.launches.operand).contiguous()


def local_gradients(x: DeltaRun, saved: Saved, added: Tensor | None, d_o: Tensor) -> None:
    """Give nothing: what needs no other rank is made with what does."""


def gradients(
    x: DeltaRun, saved: Saved, added: Tensor | None, local: None, d_o: Tensor, d_state_out: Tensor | None
) -> Gradients:
    """d_state_out is zero if None."""
    launches = x.launches
    d_state_out = None if d_state_out is None else d_state_out.contiguous()
    found = run.gradients(x, _unflat(x, saved), added, _d_o(x, d_o), d_state_out)
    own = [True, True, True, False, False, True]  # of the inputs' dtype
    return tuple(
        d.to(launches.dtype) if d is not None and of_inputs else d for d, of_inputs in zip(found, own, strict=False)
    )


def _leaving(saved: Saved) -> Tensor:
    return saved[0]


def _flat(x: DeltaRun, saved: DeltaSaved) -> Saved:
    """All tensors of `saved`, the leaving state first; an empty one for what there is not, or is an input."""
    chunks, queries = saved.chunks, saved.queries
    channels = (None,) * 4 if chunks.channels is None else tuple(chunks.channels)
    gates = (*chunks.gates, None, None)[:2]
    made = None if chunks.channels is None else queries.q
    bounds = chunks.bounds if x.launches.bounds_chunks else None
    optional = (
        saved.entering, saved.moves, bounds, *gates, chunks.k_norms, *channels, made, queries.norms, queries.scores,
    )  # fmt: skip
    nothing = saved.leaving.new_empty(0)
    return (
        saved.leaving, saved.u, chunks.inverse, chunks.betas,
        *(nothing if tensor is None else tensor for tensor in optional),
    )  # fmt: skip


def _unflat(x: DeltaRun, saved: Saved) -> DeltaSaved:
    leaving, u, inverse, betas = saved[:4]
    entering, moves, bounds, prefix, suffix, k_norms, *channels, made, q_norms, scores = (
        None if tensor.dim() == 1 else tensor for tensor in saved[4:]
    )
    gates = tuple(gate for gate in (prefix, suffix) if gate is not None)
    keys = None if channels[0] is None else ChannelKeys(*channels)  # type: ignore[arg-type]
    chunks = DeltaChunks(inverse, betas, given(bounds, betas), gates, k_norms, keys)
    queries = DeltaQueries(x.q if made is None else made, q_norms, scores)
    return DeltaSaved(leaving, u, entering, moves, chunks, queries)


def empty_saved(x: DeltaInputs, from_state: bool, over_ranks: bool, want_gate: bool) -> list[Tensor]:
    """Tensors of the shapes and dtypes of `_flat`."""
    launches = launches_of(x, not (from_state or over_ranks), want_gate)
    whole = launches.plan.whole

    def fp32(shape: tuple[int, ...], wanted: bool = True) -> Tensor:
        return x.q.new_empty(shape if wanted else (0,), dtype=torch.float32)

    def operand(shape: tuple[int, ...], wanted: bool = True) -> Tensor:
        return x.q.new_empty(shape, dtype=launches.operand) if wanted else fp32((0,))

    def gate(number: int) -> Tensor:
        return fp32(launches.slots, launches.kind == TOKEN.value and number < (2 if launches.plan.exact else 1))

    channel = launches.per_channel
    return [
        fp32(launches.state),
        operand(tuple(x.v.shape)),
        operand(launches.tiles),
        fp32(launches.slots),
        fp32(launches.state if whole else launches.states, from_state or over_ranks or not whole),
        fp32(launches.moves, over_ranks or not whole),
        fp32(launches.bounds, launches.bounds_chunks),
        gate(0),
        gate(1),
        fp32(launches.norms, launches.normalize),
        operand(launches.operands, channel),
        operand(launches.operands, channel),
        fp32(launches.totals, channel),
        x.q.new_empty(launches.totals[:3], dtype=torch.int32) if channel else fp32((0,)),
        operand(launches.operands, channel),
        fp32(launches.norms, launches.normalize),
        operand(launches.tiles, channel),
    ]


STAGES = Stages(
    prepare=prepare,
    summarize=summarize,
    local_outputs=local_outputs,
    outputs=outputs,
    summarize_adjoint=summarize_adjoint,
    local_gradients=local_gradients,
    gradients=gradients,
    unsummarized=Unsummarized(totals, totals_adjoint, _leaving),
    empty_saved=empty_saved,
    most_saved=17,
    grouped_heads=True,
    takes_no_state=True,
    bad_values_give_nan=True,
    normalizes=True,
    erases=True,
)
