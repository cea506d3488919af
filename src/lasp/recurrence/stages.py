"""The contract between a recurrence's kernels and the scan that crosses ranks.

A backend implements a recurrence as six *stages*, each local to a rank; between them the scan exchanges summaries.
Everything else that it says of itself is in the same record: kernels know of no ranks, no autograd, no exchange.

    summarize(x) -> Summary, totals
        The run as an affine map on the state. totals: what later stages reuse.
    local_outputs(x, totals) -> partial
        Work of the forward pass that needs no other rank; it runs while the exchange is in flight.
    outputs(x, totals, partial, state_in) -> o, saved
        The outputs, given the state that enters the run. saved: the tensors that backward needs, those of states with
        the other ranks' part already applied, so that backward recomputes no forward state and exchanges once.
    summarize_adjoint(x, saved, d_o) -> Summary, totals_adjoint
        The gradient of the entering state as an affine map on the gradient of the leaving state.
    local_gradients(x, saved, totals_adjoint, d_o) -> local
        Gradients that need no other rank (those of q).
    gradients(x, saved, totals_adjoint, local, d_o, d_state_out) -> gradients of x's tensors, in order
        d_state_out: the gradient of the state that leaves the run.

A recurrence whose outputs see the whole sequence instead of the past (`causal=False`) has the same stages; the
state that enters `outputs` is then the state after all ranks, and the same for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from lasp.algebra import Summary

# A run's inputs as the operators have them, and as a backend's stages take them.
Given = TypeVar("Given")
Run = TypeVar("Run", bound="RunInputs")
Totals = TypeVar("Totals")
Partial = TypeVar("Partial")
TotalsAdjoint = TypeVar("TotalsAdjoint")
Local = TypeVar("Local")
Saved = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]


class RunInputs(Protocol):
    """A run as the scan and the stages take it; see `lasp.recurrence.inputs.Inputs`."""

    @property
    def v(self) -> Tensor: ...
    @property
    def g(self) -> Tensor | None: ...
    def tensors(self) -> tuple[Tensor | None, ...]: ...
    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Any: ...


@dataclass(frozen=True)
class Unsummarized(Generic[Run, Totals, TotalsAdjoint]):
    """Stages of a backend that needs no summary on one device.

    Attributes:
        totals: (x) -> totals, as `summarize` gives them.
        totals_adjoint: (x, saved, d_o) -> totals_adjoint.
        leaving: (saved) -> the state that leaves the run.
    """

    totals: Callable[[Run], Totals]
    totals_adjoint: Callable[[Run, Saved, Tensor], TotalsAdjoint]
    leaving: Callable[[Saved], Tensor]


@dataclass(frozen=True)
class Stages(Generic[Given, Run, Totals, Partial, TotalsAdjoint, Local]):
    """A backend of one recurrence; the six stages are described at the head of this file.

    Attributes:
        prepare: (x, alone) -> x as the stages take it; alone: it is the whole sequence and starts from no state.
        unsummarized: what one device does instead of summarizing; None where it cannot be spared.
        empty_saved: (x, from_state, over_ranks, want_gate) -> tensors of the shapes that `outputs` saves without
            computing: whether an initial state is given, ranks share the sequence, the gradient of g is wanted. A
            backend that has it is an operator of compiled graphs, which do not look inside, and saves no input but that
            state. Others are traced.
        most_saved: the most tensors that `outputs` saves, of such a backend.
        grouped_heads: q and k may have fewer heads than v.
        takes_no_state: a state or gradient of one that is zero may be given as None.
        reads_queries_late: `summarize` reads no queries: they may be computed while the exchange is under way.
        traceable: torch.compile can follow the stages; it cannot where they take gradients of their own.
        bad_values_give_nan: a gate that is positive or NaN, or a beta outside [0, 2], makes outputs NaN from its chunk
            on, so that nobody need look for one before.
        weighs: (x) -> whether they take x with weights of tokens and skips; None where they never do.
        wide: the stages for heads wider than the fused kernels take; None where these take any, or refuse them.
        normalizes: they divide q and k by their lengths where `x.normalize` says so.
        erases: they take an erase key of its own.
        multiplies: PyTorch multiplies matrices in them or for their summaries, which autocast must not round.
    """

    prepare: Callable[[Given, bool], Run]
    summarize: Callable[[Run], tuple[Summary, Totals]]
    local_outputs: Callable[[Run, Totals], Partial]
    outputs: Callable[[Run, Totals, Partial, Tensor], tuple[Tensor, Saved]]
    summarize_adjoint: Callable[[Run, Saved, Tensor], tuple[Summary, TotalsAdjoint]]
    local_gradients: Callable[[Run, Saved, TotalsAdjoint, Tensor], Local]
    gradients: Callable[[Run, Saved, TotalsAdjoint, Local, Tensor, Tensor], Gradients]
    unsummarized: Unsummarized[Run, Totals, TotalsAdjoint] | None = None
    empty_saved: Callable[[Given, bool, bool, bool], list[Tensor]] | None = None
    most_saved: int = 0
    grouped_heads: bool = False
    takes_no_state: bool = False
    reads_queries_late: bool = False
    traceable: bool = True
    bad_values_give_nan: bool = False
    normalizes: bool = False
    erases: bool = False
    weighs: Callable[[Given], bool] | None = None
    wide: Stages[Any, Any, Any, Any, Any, Any] | None = None
    multiplies: bool = True


# Those of any family: what they hand from one to the next is their own.
AnyStages = Stages[Any, Any, Any, Any, Any, Any]
