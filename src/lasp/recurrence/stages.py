"""The contract between a recurrence's kernels and the scan that crosses ranks.

A backend of a recurrence is a module of six *stages*. Each is local to a rank; between them the caller exchanges
summaries. Tensors marked opaque are the backend's own (tuples of tensors or None), handed from stage to stage.

    summarize(x) -> Summary, totals
        The run as an affine map on the state. totals (opaque): what `outputs` can reuse.
    local_outputs(x, totals) -> partial
        Work of the forward pass that needs no other rank; it runs while the exchange is in flight. Opaque.
    outputs(x, totals, partial, state_in) -> o, saved
        The outputs, given the state that enters the run. saved (opaque): the states the backward pass needs, with
        the other ranks' part already applied, so that backward recomputes no forward state and exchanges once.
    summarize_adjoint(x, saved, d_o) -> Summary, totals_adjoint
        The gradient of the entering state as an affine map on the gradient of the leaving state.
    local_gradients(x, saved, totals_adjoint, d_o) -> local
        Gradients that need no other rank (those of q). Opaque.
    gradients(x, saved, totals_adjoint, local, d_o, d_state_out) -> gradients of x's tensors, in order
        d_state_out: the gradient of the state that leaves the run.

A backend may also have

    fused(x, initial, want_final, across, started, key) -> o, final states or None
        All stages at once, differentiable, for less of the host's time and as one operator of a compiled graph; initial
        is None for zero, across (`lasp.recurrence.across`) None on one device. With packed documents, which it need
        take outside compiled graphs only, initial and final states are those of every document of the whole sequence
        (`lasp.recurrence.packed_documents`). Operators then go this way alone: a backend that has it keeps its stages,
        which need not be fit for tracing, for tests and benchmarks, which run them one by one and play ranks with them.
    start(x, initial, want_final, across) -> started
        What `fused` does before it reads queries: it begins the exchange, during which these can be computed. Opaque.
    BAD_GATES_GIVE_NAN = True
        A gate that is positive or NaN makes outputs NaN from its token on, so that nobody need look for one before.

A recurrence whose outputs see the whole sequence instead of the past (`causal=False`) has the same stages; the
state that enters `outputs` is then the state after all ranks, and the same for gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lasp.algebra import Summary
from lasp.recurrence.documents import Documents


class Stages(Protocol):
    """A backend of one recurrence; modules satisfy this protocol."""

    GROUPED_HEADS: bool  # whether q and k may have fewer heads than v

    def summarize(self, x: Any) -> tuple[Summary, Any]: ...
    def local_outputs(self, x: Any, totals: Any) -> Any: ...
    def outputs(self, x: Any, totals: Any, partial: Any, state_in: Tensor) -> tuple[Tensor, Any]: ...
    def summarize_adjoint(self, x: Any, saved: Any, d_o: Tensor) -> tuple[Summary, Any]: ...
    def local_gradients(self, x: Any, saved: Any, totals_adjoint: Any, d_o: Tensor) -> Any: ...
    def gradients(
        self, x: Any, saved: Any, totals_adjoint: Any, local: Any, d_o: Tensor, d_state_out: Tensor
    ) -> tuple[Tensor | None, ...]: ...


class DecayInputs(NamedTuple):
    """The inputs of the decay family, S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t, on one rank.

    Attributes:
        q, k: [B, T, H, K].
        v: [B, T, H_v, V], H_v a multiple of H.
        g: log-decay <= 0 in the state's dtype: None, [H_v], [B, T, H_v] or [B, T, H_v, K].
        scale: factor of the outputs.
        documents: where packed documents lie (then B = 1), or None. States are one for each document here, else one
            for each sequence of the batch.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    scale: float
    documents: Documents | None = None


def tensors_of(x: Any) -> tuple[Tensor | None, ...]:
    """The tensors among a run's inputs: all but its last two fields, scale and documents."""
    return tuple(x[:-2])


def num_states(x: Any) -> int:
    """How many states the run has: one for each document here, else for each sequence of the batch."""
    return int(x.q.shape[0]) if x.documents is None else len(x.documents.ids)
