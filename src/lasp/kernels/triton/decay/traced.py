"""The six stages as torch.compile sees them: operators, which it does not look into.

Around an exchange the compiler traces the scan across ranks and calls these in between. Elsewhere the stages are those
of `stages`. An operator gives new tensors back: none of its inputs, no two in the same memory.

Whether a gate's gradient is wanted is not known while tracing. Gates of tokens and channels are taken to be learned,
constants not to be (COMPILED_CONSTANTS_ARE_FIXED), whose sweeps with gradients take twice as long.
"""

# No postponed annotations: the operators' schemas are read from them.
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lasp.algebra import Diagonal, Identity, Scalar, Summary
from lasp.kernels.triton.decay import channel_stages, stages
from lasp.kernels.triton.decay.gates import TOKEN
from lasp.kernels.triton.decay.sweep import PART_ROWS
from lasp.kernels.triton.decay.work import kind_of, partial_dtype, per_channel, plan_of
from lasp.recurrence.contract import Run

COMPILED_CONSTANTS_ARE_FIXED = True


def _compiling(x: Run) -> bool:
    return torch.compiler.is_compiling() and x.documents is None


def _untraced(stage: Callable[..., Any]) -> Callable[..., Any]:
    """`stage`, into which torch.compile must not look: with packed documents it breaks the graph here."""
    return torch.compiler.disable(stage) if torch.compiler.is_compiling() else stage


def _run(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float) -> Run:
    return Run(q, k, v, None if g is None else g.detach().requires_grad_(_learned(g)), scale)


def _learned(g: Tensor | None) -> bool:
    return g is not None and g.dim() > 1


def _segments(g: Tensor | None, tensors: list[Tensor]) -> Any:
    states, decays, *gates = tensors
    return channel_stages.Segments(states, decays) if per_channel(g) else stages.Segments(states, decays, tuple(gates))


def _segments_list(totals: Any) -> list[Tensor]:
    """The inverse of `_segments`."""
    return [totals.states, totals.decays, *getattr(totals, "gates", ())]


def _local(g: Tensor | None, saved: Any, tensors: list[Tensor]) -> Any:
    if per_channel(g):
        return channel_stages.QueryReads(*tensors)
    return stages.QueryGradient(*tensors) if len(tensors) > 1 else stages.QueryGradient(tensors[0], saved.leaving)


@torch.library.custom_op("lasp::decay_summarize", mutates_args=())
def _summarize(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, d_o: Tensor | None, scale: float) -> list[Tensor]:
    x = _run(q, k, v, g, scale)
    summary, totals = stages.summarize(x) if d_o is None else stages.summarize_adjoint(x, d_o)
    states, decays, *gates = _segments_list(totals)
    return [summary.state, *summary.transition.tensors(), states, decays.clone(), *gates]


@_summarize.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, d_o: Tensor | None, scale: float) -> list[Tensor]:
    (B, _, H_v, V), K, p = v.shape, q.shape[3], plan_of(q, v, g)
    decays = (K,) if per_channel(g) else ()
    shapes = [(B, H_v, K, V), *([] if g is None else [(B, H_v, *decays)])]
    shapes += [(B, H_v, p.segments, K, V), (B, H_v, p.segments, *decays)]
    if not per_channel(g):
        per_token = kind_of(g) == TOKEN.value and d_o is None
        shapes += [(B, H_v, p.chunks * p.chunk)] * 3 if per_token else [(B, H_v, p.segments)]
    return [q.new_empty(shape, dtype=torch.float32) for shape in shapes]


@torch.library.custom_op("lasp::decay_prepare", mutates_args=())
def _prepare(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> list[Tensor]:
    return list(stages.local_outputs(_run(q, k, v, g, scale), None))


@_prepare.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> list[Tensor]:
    return list(channel_stages.empty_prepared(q, v, plan_of(q, v, g)))


@torch.library.custom_op("lasp::decay_outputs", mutates_args=())
def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    totals: list[Tensor],
    prepared: list[Tensor],
    state_in: Tensor,
    scale: float,
) -> list[Tensor]:
    """o, the state leaving the run and those entering segments."""
    x = _run(q, k, v, g, scale)
    # The kernel writes the states that enter segments over those without the other ranks' part.
    segments = _segments(g, [totals[0].clone(), *totals[1:]])
    partial = channel_stages.Prepared(*prepared) if prepared else None
    o, saved = stages.outputs(x, segments, partial, state_in)
    return [o, saved.leaving, saved.entering]


@_outputs.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    totals: list[Tensor],
    prepared: list[Tensor],
    state_in: Tensor,
    scale: float,
) -> list[Tensor]:
    return [v.new_empty(v.shape), state_in.new_empty(state_in.shape), torch.empty_like(totals[0])]


@torch.library.custom_op("lasp::decay_local_gradients", mutates_args=())
def _local_gradients(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, saved: list[Tensor], d_o: Tensor, scale: float
) -> list[Tensor]:
    local = stages.local_gradients(_run(q, k, v, g, scale), stages.saved_of(g, saved), None, d_o)
    return [tensor for tensor in local if tensor is not saved[0]]


@_local_gradients.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, saved: list[Tensor], d_o: Tensor, scale: float
) -> list[Tensor]:
    (B, T, H_v, _), K, p = v.shape, q.shape[3], plan_of(q, v, g)
    if per_channel(g):
        read_q = q.new_empty(B, T, H_v, K, dtype=channel_stages.read_dtype(q.dtype))
        return [read_q, q.new_empty(B, H_v, p.chunks, K, dtype=torch.float32)]
    dq = q.new_empty(B, T, H_v, K, dtype=partial_dtype(q.dtype, q.shape[2], H_v))
    if not _learned(g):
        return [dq]
    columns = p.scalar_keys.columns
    parts = -(-K // columns) * columns // PART_ROWS.value
    return [dq, q.new_empty(parts, B, H_v, p.chunks * p.chunk, dtype=torch.float32)]


@torch.library.custom_op("lasp::decay_gradients", mutates_args=())
def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    saved: list[Tensor],
    adjoint: list[Tensor],
    local: list[Tensor],
    d_o: Tensor,
    d_state_out: Tensor,
    scale: float,
) -> list[Tensor]:
    """Of q, k, v and, if it is learned, g."""
    kept = stages.saved_of(g, saved)
    totals, partial = _segments(g, adjoint), _local(g, kept, local)
    found = stages.gradients(_run(q, k, v, g, scale), kept, totals, partial, d_o, d_state_out)
    return [tensor.clone() if tensor is local[0] else tensor for tensor in found if tensor is not None]


@_gradients.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    saved: list[Tensor],
    adjoint: list[Tensor],
    local: list[Tensor],
    d_o: Tensor,
    d_state_out: Tensor,
    scale: float,
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (q, k, v, *([g] if g is not None and _learned(g) else []))]


def _summary(x: Run, tensors: list[Tensor]) -> tuple[Summary, Any]:
    if x.g is None:
        return Summary(Identity(), tensors[0]), _segments(x.g, tensors[1:])
    transition = (Diagonal if per_channel(x.g) else Scalar)(tensors[1])
    return Summary(transition, tensors[0]), _segments(x.g, tensors[2:])


def summarize(x: Run) -> tuple[Summary, Any]:
    if not _compiling(x):
        return _untraced(stages.summarize)(x)
    return _summary(x, _summarize(x.q, x.k, x.v, x.g, None, x.scale))


def local_outputs(x: Run, totals: Any) -> Any:
    if not _compiling(x):
        return _untraced(stages.local_outputs)(x, totals)
    if x.g is None or not per_channel(x.g):
        return None
    return channel_stages.Prepared(*_prepare(x.q, x.k, x.v, x.g, x.scale))


def outputs(x: Run, totals: Any, partial: Any, state_in: Tensor) -> tuple[Tensor, Any]:
    if not _compiling(x):
        return _untraced(stages.outputs)(x, totals, partial, state_in)
    prepared = [] if partial is None else list(partial)
    o, leaving, entering = _outputs(x.q, x.k, x.v, x.g, _segments_list(totals), prepared, state_in, x.scale)
    return o, stages.saved_of(x.g, [leaving, entering, *(prepared or totals.gates)])


def summarize_adjoint(x: Run, d_o: Tensor) -> tuple[Summary, Any]:
    if not _compiling(x):
        return _untraced(stages.summarize_adjoint)(x, d_o)
    return _summary(x, _summarize(x.q, x.k, x.v, x.g, d_o, x.scale))


def local_gradients(x: Run, saved: Any, totals_adjoint: Any, d_o: Tensor) -> Any:
    if not _compiling(x):
        return _untraced(stages.local_gradients)(x, saved, totals_adjoint, d_o)
    return _local(x.g, saved, _local_gradients(x.q, x.k, x.v, x.g, stages.saved_list(saved), d_o, x.scale))


def gradients(
    x: Run, saved: Any, totals_adjoint: Any, local: Any, d_o: Tensor, d_state_out: Tensor
) -> tuple[Tensor | None, ...]:
    if not _compiling(x):
        return _untraced(stages.gradients)(x, saved, totals_adjoint, local, d_o, d_state_out)
    kept = list(local) if _learned(x.g) else [local.dq]
    found = _gradients(
        x.q, x.k, x.v, x.g, stages.saved_list(saved), _segments_list(totals_adjoint), kept, d_o, d_state_out, x.scale
    )
    return tuple(found) if _learned(x.g) else (*found, None)
