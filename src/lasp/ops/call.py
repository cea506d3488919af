"""What every operator does around its scan: refuse, tell the other ranks, spread grouped heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lasp.ops.checks import check_state
from lasp.ops.scan import ScanPlan
from lasp.recurrence.documents import Documents, documents_here
from lasp.recurrence.inputs import Inputs, initial_shape
from lasp.sequence import SequenceParallel
from lasp.sequence.arguments import number
from lasp.sequence.call import SequenceCall
from lasp.sequence.shards import document_bounds, document_digest

_Inputs = TypeVar("_Inputs", bound=Inputs)


def packed(
    cu_seqlens: Tensor | Sequence[int] | None, batch: int, tokens: int, sp: SequenceParallel | None
) -> Documents | None:
    """The documents on this rank, which holds `tokens` tokens of each of `batch` sequences.

    Raises:
        ValueError: cu_seqlens does not describe the whole sequence, or there are several sequences.
    """
    if cu_seqlens is None:
        return None
    total = tokens if sp is None else sp.total(tokens)
    bounds = document_bounds(cu_seqlens, total, batch)
    return documents_here(bounds, 0 if sp is None else sp.offset(tokens), tokens)


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor of the outputs: K ** -0.5 where none is given.

    Raises:
        ValueError: it is no finite constant.
    """
    return q.shape[3] ** -0.5 if scale is None else number("scale", scale)


def check_initial(x: Inputs, initial_state: Tensor | None) -> None:
    """The initial state, if there is one, fits.

    Raises:
        ValueError: it does not.
    """
    if initial_state is not None:
        check_state(initial_state, initial_shape(x), x.q)


def called(plan: ScanPlan, x: Inputs, initial_state: Tensor | None) -> SequenceCall | None:
    """Tell the other ranks what is about to be computed; what is sent for it is then part of this call.

    None without other ranks, and in a compiled graph, where the exchange does so itself when it runs.
    """
    sp = plan.ranks
    if sp is None or torch.compiler.is_compiling():
        return None
    tensors = x.tensors()
    learned = any(tensor is not None and tensor.requires_grad for tensor in (*tensors, initial_state))
    differentiable = torch.is_grad_enabled() and learned
    gate_dims = None if x.g is None else x.g.dim()
    start = "none" if initial_state is None else f"requires_grad={initial_state.requires_grad}"
    # Looked up in every step; what the ranks compare is written out only when it is new.
    key = (
        x.q.shape, x.v.shape, x.q.dtype, gate_dims, x.scale, start, plan.want_final, differentiable,
        *plan.options.values(),
    )  # fmt: skip

    def fields() -> dict[str, object]:
        return {
            "batch": x.q.shape[0],
            "tokens (pass lengths= to SequenceParallel for unequal shards)": (
                x.q.shape[1] if sp.lengths is None else "by lengths"
            ),
            "heads of q and v": (x.q.shape[2], x.v.shape[2]),
            "K and V": (x.q.shape[3], x.v.shape[3]),
            "dtype": str(x.q.dtype),
            "gate dims": gate_dims,
            "scale": x.scale,
            "initial_state": start,
            "output_final_state": plan.want_final,
            "gradients": differentiable,
            **plan.options,
        }

    documents = None if x.documents is None else document_digest(x.documents.cu_seqlens)
    return sp.call(plan.operator, key, fields, documents, tensors, replays=True)


def ungrouped(x: _Inputs) -> _Inputs:
    """x with a query head for every value head, for stages that cannot share them."""
    groups = x.v.shape[2] // x.q.shape[2]
    if groups == 1:
        return x
    q, k, *others = x.tensors()
    assert q is not None and k is not None
    return x.with_tensors((q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2), *others))
