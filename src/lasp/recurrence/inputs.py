"""Inputs of a recurrence's stages on a rank: tensors, the outputs' factor, and where packed documents lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lasp.algebra import Diagonal, Identity, Scalar, Transition
from lasp.recurrence.documents import Documents

# Added to the squared length of queries and keys where they are divided by it, so that a zero vector stays zero.
NORM_EPS = 1e-6

_Self = TypeVar("_Self", bound="Inputs")


class Inputs(Protocol):
    """The inputs of any recurrence on one rank.

    Attributes:
        q, k: [B, T, H, K].
        v: [B, T, H_v, V], H_v a multiple of H.
        g: log-decay <= 0 in the state's dtype: None, [H_v], [B, T, H_v] or [B, T, H_v, K].
        scale: factor of the outputs.
        documents: where packed documents lie (then B = 1), or None. States are one for each document here, else one
            for each sequence of the batch.
    """

    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def g(self) -> Tensor | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def documents(self) -> Documents | None: ...

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The differentiable tensors, in the order in which gradients are given."""
        ...

    def with_tensors(self: _Self, tensors: Sequence[Tensor | None]) -> _Self:
        """The same run with others in their places."""
        ...


class DecayInputs(NamedTuple):
    """The inputs of the decay family, see `Inputs`.

    S_t = exp(g_t) S_{t-1} + w_t k_t v_t^T, o_t = scale q_t S_t + skip v_t.

    Attributes:
        log_weight: log w [B, T, H_v] in the state's dtype, only where stages take it (`Stages.weighs`); 0 if None.
        skip: [H_v] in the state's dtype, given where log_weight is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    scale: float
    documents: Documents | None = None
    log_weight: Tensor | None = None
    skip: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        tensors = (self.q, self.k, self.v, self.g)
        return tensors if self.log_weight is None else (*tensors, self.log_weight, self.skip)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> DecayInputs:
        return DecayInputs(*tensors[:4], self.scale, self.documents, *tensors[4:])  # type: ignore[arg-type, call-arg]


class DeltaInputs(NamedTuple):
    """The inputs of the delta family, see `Inputs`.

    S_t = (I - beta_t k_t r_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale q_t S_t.

    Attributes:
        beta: [B, T, H_v], in [0, 2], in the state's dtype.
        g: None (DeltaNet), [B, T, H_v] (Gated DeltaNet) or [B, T, H_v, K] (KDA).
        erase_key: r, as k; k itself if None.
        normalize: q and k are to be divided by their lengths, sqrt(sum of squares + NORM_EPS), by stages that do so.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    scale: float
    documents: Documents | None = None
    normalize: bool = False
    erase_key: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        tensors = (self.q, self.k, self.v, self.beta, self.g)
        return tensors if self.erase_key is None else (*tensors, self.erase_key)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> DeltaInputs:
        own, erase_key = tensors[:5], tensors[5] if len(tensors) > 5 else None
        others = (self.scale, self.documents, self.normalize, erase_key)
        return DeltaInputs(*own, *others)  # type: ignore[arg-type, call-arg]


def as_given(x: _Self, alone: bool) -> _Self:
    """Returns the inputs as they are: the `prepare` of stages that take any tensors."""
    return x


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States, decays and what crosses ranks are fp32, or fp64 for fp64 inputs: never 16 bits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def num_states(x: Inputs) -> int:
    """Number of the run's states: one for each document here, else for each sequence of the batch."""
    return int(x.q.shape[0]) if x.documents is None else len(x.documents.ids)


def state_shape(x: Inputs) -> tuple[int, int, int, int]:
    """[B, H_v, K, V] of the states; [documents here, H_v, K, V] where they are packed."""
    return (num_states(x), x.v.shape[2], x.q.shape[3], x.v.shape[3])


def initial_shape(x: Inputs) -> tuple[int, int, int, int]:
    """[B, H_v, K, V] of initial and final states; one for each document of the whole sequence where they are packed."""
    shape = state_shape(x)
    return shape if x.documents is None else (x.documents.count, *shape[1:])


def transition(x: DecayInputs) -> Transition:
    """The product of the run's transitions, for each of its states."""
    count, heads = num_states(x), x.v.shape[2]
    if x.g is None:
        return Identity()
    if x.g.dim() == 1:
        if x.documents is None:
            # Not a product: no tokens of a decay of -inf would be NaN.
            total = x.g * x.v.shape[1] if x.v.shape[1] else torch.zeros_like(x.g)
            return Scalar(total.expand(count, -1))
        lengths = torch.tensor([end - start for start, end in x.documents.spans], dtype=x.g.dtype, device=x.g.device)
        return Scalar(lengths[:, None] * x.g)
    if x.documents is None:
        total = x.g.sum(1, dtype=torch.float64)
    else:  # added one by one: in fp32 that would be percents off over a million tokens
        total = x.g.new_zeros(count, heads, *x.g.shape[3:], dtype=torch.float64)
        total.index_add_(0, x.documents.of_tokens.to(x.g.device), x.g[0].double())
    total = total.to(x.g.dtype)
    return Scalar(total) if x.g.dim() == 3 else Diagonal(total)
