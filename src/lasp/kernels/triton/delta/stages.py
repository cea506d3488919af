"""The delta rule's stages on a GPU.

summarize: A of every chunk, what every segment does to the state, scan over segments.  outputs: sweep of o and u.
summarize_adjoint: sweep of D, reversed scan.  gradients: sweep of dv, which leaves D at every chunk's end; sweep of dq,
dk and the rest.  Kept for backward: A, u and a state and a transition per segment, with other ranks' part applied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.triton.common.launch import use_scratch
from lasp.kernels.triton.decay.gates import TOKEN
from lasp.kernels.triton.decay.layout import bounds_of, chunks_of, given, places_of
from lasp.kernels.triton.delta.launches import DeltaLaunches, launches_of

NORM_EPS = 1e-6


class DeltaTensors(NamedTuple):
    """A run as the kernels take it: dense tensors of their dtype, and its launches."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    work: DeltaLaunches


class Chunks(NamedTuple):
    """What is made of every chunk before any sweep.

    Attributes:
        inverse: A - I, [B, H_v, chunks, C, C].
        betas: [B, H_v, chunks C].
        gates: prefix and, where decays are exact, suffix, likewise; none without a gate per token.
        k_norms: [B, H, chunks C], or None.
    """

    inverse: Tensor
    betas: Tensor
    gates: tuple[Tensor, ...]
    k_norms: Tensor | None


class DeltaSegments(NamedTuple):
    """What segments do to the state: added [B, H_v, segments, K, V] and moves [.., K, K]; None of single ones."""

    added: Tensor | None
    moves: Tensor | None
    chunks: Chunks


class DeltaSaved(NamedTuple):
    """What backward needs: the state leaving the run, u, those that enter segments (None for zero), and `moves`."""

    leaving: Tensor
    u: Tensor
    entering: Tensor | None
    moves: Tensor | None
    chunks: Chunks
    q_norms: Tensor | None


def tensors_of(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, work: DeltaLaunches
) -> DeltaTensors:
    use_scratch()
    q, k, v = (t.to(work.operand).contiguous() for t in (q, k, v))
    return DeltaTensors(q, k, v, beta.contiguous(), None if g is None else g.contiguous(), work)


def _fp32(x: DeltaTensors, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.v.device)


def _two(gates: tuple[Tensor, ...], unread: Tensor) -> tuple[Tensor, ...]:
    """prefix and suffix; `unread` for what there is not."""
    return (*gates, unread, unread)[:2]


def _norms(x: DeltaTensors, tensor: Tensor) -> Tensor | None:
    if not x.work.normalize:
        return None
    norms = _fp32(x, x.work.norms)
    x.work.norms_of(NORM_EPS)(tensor, norms, chunks_of(x.work.plan, norms))
    return norms


def chunks_made(x: DeltaTensors) -> Chunks:
    work, places = x.work, chunks_of(x.work.plan, x.beta)
    gates: tuple[Tensor, ...] = ()
    if work.kind == TOKEN.value:
        gates = tuple(_fp32(x, work.slots) for _ in range(2 if work.plan.exact else 1))
        assert x.g is not None
        work.gate_sums(x.g, *_two(gates, gates[0]), places)
    norms = _norms(x, x.k)
    inverse, betas = x.v.new_empty(work.tiles), _fp32(x, work.slots)
    g, unread = given(x.g, x.beta), betas
    work.solve(
        x.k, given(norms, unread), unread, x.beta, g, _two(gates, unread)[0], inverse, betas, places
    )  # fmt: skip
    return Chunks(inverse, betas, gates, norms)


def totals(x: DeltaTensors, *, summarized: bool) -> DeltaSegments:
    work, chunks = x.work, chunks_made(x)
    if work.plan.whole and not summarized:
        return DeltaSegments(None, None, chunks)
    added, moves = _fp32(x, work.states), _fp32(x, work.moves)
    work.summary(
        x.k, x.k, x.v, chunks.inverse, chunks.betas, given(chunks.k_norms, added), *_two(chunks.gates, added), added,
        added, moves, places_of(work.plan, added),
    )  # fmt: skip
    return DeltaSegments(added, moves, chunks)


def _scanned(
    x: DeltaTensors, added: Tensor, moves: Tensor, outside: Tensor | None, *, leaves: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """States that enter segments; and the one that leaves the run, where `leaves`."""
    work, entering = x.work, torch.empty_like(added)
    leaving = _fp32(x, work.state) if leaves else entering
    launch = work.scan(given=outside is not None, leaves=leaves, reverse=reverse)
    launch(added, moves, entering, leaving, bounds_of(work.plan, added), given(outside, added))
    return entering, leaving


def transition_of(x: DeltaTensors, moves: Tensor, *, reverse: bool) -> Tensor:
    """[B or documents, H_v, K, K]: what the run does to the state that enters it; transposed if `reverse`."""
    leaving = _fp32(x, x.work.transition)
    bounds = bounds_of(x.work.plan, moves)
    x.work.transition_scan(reverse=reverse)(moves, moves, torch.empty_like(moves), leaving, bounds, moves)
    return leaving


def outputs(x: DeltaTensors, segments: DeltaSegments, state_in: Tensor | None) -> tuple[Tensor, DeltaSaved]:
    """state_in is zero if None."""
    work, chunks = x.work, segments.chunks
    entering = state_in
    if segments.added is not None and not work.plan.whole:
        assert segments.moves is not None
        entering, _ = _scanned(x, segments.added, segments.moves, state_in, leaves=False, reverse=False)
    o, u, leaving = torch.empty_like(x.v), torch.empty_like(x.v), _fp32(x, work.state)
    q_norms = _norms(x, x.q)
    unread = leaving
    work.output(
        x.q, x.k, x.k, x.v, chunks.inverse, unread, chunks.betas, given(q_norms, unread),
        given(chunks.k_norms, unread), given(x.g, unread), *_two(chunks.gates, unread), unread, o, u, leaving,
        places_of(work.plan, unread), entering,
    )  # fmt: skip
    if x.v.numel() == 0:  # no kernel ran
        leaving.zero_() if state_in is None else leaving.copy_(state_in)
    return o, DeltaSaved(leaving, u, entering, segments.moves, chunks, q_norms)


def totals_adjoint(x: DeltaTensors, saved: DeltaSaved, d_o: Tensor, *, summarized: bool) -> Tensor | None:
    """What segments add to the gradient of the state; None where there is but one and it is not wanted."""
    use_scratch()  # backward passes have threads of their own
    work = x.work
    if work.plan.whole and not summarized:
        return None
    added = _fp32(x, work.states)
    launch = work.whole_adjoint if summarized else work.adjoint
    _reverse(x, saved, d_o, launch, added, added, added, None)
    return added


def _reverse(
    x: DeltaTensors,
    saved: DeltaSaved,
    d_o: Tensor,
    launch: object,
    added: Tensor,
    dv: Tensor,
    d_chunks: Tensor,
    entering: Tensor | None,
) -> None:
    chunks, unread = saved.chunks, saved.leaving
    launch(  # type: ignore[operator]
        x.q, x.k, x.k, d_o, chunks.inverse, unread, chunks.betas, given(saved.q_norms, unread),
        given(chunks.k_norms, unread), given(x.g, unread), *_two(chunks.gates, unread), unread, added, dv, d_chunks,
        places_of(x.work.plan, unread), entering,
    )  # fmt: skip


def gradients(
    x: DeltaTensors, saved: DeltaSaved, added: Tensor | None, d_o: Tensor, d_state_out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Of q, k, v, beta and g; d_state_out is zero if None."""
    work, chunks, unread = x.work, saved.chunks, saved.leaving
    entering = d_state_out
    if added is not None and not work.plan.whole:
        assert saved.moves is not None
        entering, _ = _scanned(x, added, saved.moves, d_state_out, leaves=False, reverse=True)
    dv, d_chunks = torch.empty_like(x.v), x.v.new_empty(work.d_chunks)
    _reverse(x, saved, d_o, work.values, unread, dv, d_chunks, entering)
    dq, dk = (x.q.new_empty(work.gradient, dtype=work.gradient_dtype) for _ in range(2))
    d_beta = _fp32(x, tuple(x.beta.shape))
    dg = _fp32(x, work.gates) if work.with_gate else unread
    work.keys(
        x.q, x.k, d_o, saved.u, dv, chunks.betas, given(saved.q_norms, unread), given(chunks.k_norms, unread),
        given(x.g, unread), *_two(chunks.gates, unread), d_chunks, dq, dk, d_beta, dg,
        places_of(work.plan, unread), saved.entering,
    )  # fmt: skip
    if work.summed:
        dq, dk = _summed(x, x.q, dq, saved.q_norms), _summed(x, x.k, dk, chunks.k_norms)
    return dq, dk, dv, d_beta, dg.sum(0) if work.with_gate else None


def _summed(x: DeltaTensors, tensor: Tensor, partial: Tensor, norms: Tensor | None) -> Tensor:
    """[B, T, H_v, K] -> [B, T, H, K], of the tensor as it was before it was divided by its length."""
    gradient = torch.empty_like(tensor)
    x.work.key_gradient_sum(tensor, partial, gradient, chunks_of(x.work.plan, partial), norms)
    return gradient


__all__ = ["DeltaTensors", "launches_of", "outputs", "tensors_of", "totals", "totals_adjoint", "transition_of"]
