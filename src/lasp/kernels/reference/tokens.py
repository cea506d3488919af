"""One token of every recurrence as an affine map on the state [B, H, K, V]: what the recurrences mean."""

from __future__ import annotations

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
        transition = Scalar(x.g[:, t]) if x.g.dim() == 3 else Diagonal(x.g[:, t])
    return Summary(transition, added)


def delta_token(x: DeltaInputs, t: int, dtype: torch.dtype) -> Summary:
    """S -> (I - beta_t k_t r_t^T) diag(exp(g_t)) S + beta_t k_t v_t^T."""
    k, v, beta = (tensor[:, t].to(dtype) for tensor in (x.k, x.v, x.beta))
    r = k if x.erase_key is None else x.erase_key[:, t].to(dtype)
    erase = torch.eye(k.shape[-1], dtype=dtype, device=k.device) - beta[..., None, None] * _outer(k, r)
    if x.g is not None:
        decay = x.g[:, t].exp()
        erase = erase * (decay[..., None, None] if decay.dim() == 2 else decay[..., None, :])
    return Summary(Dense(erase), beta[..., None, None] * _outer(k, v))
