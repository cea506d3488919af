"""One token of every recurrence as an affine map on the state [B, H, K, V]: what the recurrences mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.algebra import Dense, Diagonal, Identity, Scalar, Summary, Transition
from lasp.recurrence.inputs import DecayInputs, DeltaInputs


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def decay_token(x: DecayInputs, t: int, dtype: torch.dtype) -> Summary:
    """S -> exp(g_t) S + k_t v_t^T."""
    added = _outer(x.k[:, t].to(dtype), x.v[:, t].to(dtype))
    transition: Transition = Identity()
    if x.g is not None and x.g.dim() == 1:
        transition = Scalar(x.g.expand(added.shape[0], -1))
    elif x.g is not None:
        transition = _decay(x.g[:, t])
    return Summary(transition, added)


@dataclass(frozen=True)
class Erasure(Transition):
    """The transition of a delta rule's token in factors: S -> after (I - write erase^T) before S, vectors [..., K].

    As a matrix it would round what is erased, a K-th of the state for keys of length 1, to the digits of the 1 that it
    is taken from. Products of tokens are matrices.
    """

    write: Tensor
    erase: Tensor
    before: Transition
    after: Transition

    def apply(self, state: Tensor) -> Tensor:
        state = self.before.apply(state)
        erased = self.write[..., :, None] * (self.erase[..., None, :] @ state)
        return self.after.apply(state - erased)

    def compose(self, early: Dense) -> Dense:  # type: ignore[override]
        return Dense(self.apply(early.matrix))

    def adjoint(self) -> Erasure:
        return Erasure(self.erase, self.write, self.after, self.before)

    @classmethod
    def identity(cls, state: Tensor) -> Dense:  # type: ignore[override]
        return Dense.identity(state)


def _decay(g: Tensor) -> Transition:
    """The transition of a gate of one token [B, H] or [B, H, K]."""
    return Scalar(g) if g.dim() == 2 else Diagonal(g)


def delta_token(x: DeltaInputs, t: int, dtype: torch.dtype) -> Summary:
    """S -> (I - beta_t k_t r_t^T) diag(exp(g_t)) S + beta_t k_t v_t^T."""
    k, v, beta = (tensor[:, t].to(dtype) for tensor in (x.k, x.v, x.beta))
    r = k if x.erase_key is None else x.erase_key[:, t].to(dtype)
    k = beta[..., None] * k
    decay = Identity() if x.g is None else _decay(x.g[:, t])
    return Summary(Erasure(k, r, decay, Identity()), _outer(k, v))
