"""The delta family: S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale q_t S_t."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lasp.recurrence.documents import Documents


class DeltaInputs(NamedTuple):
    """The inputs of the delta family on one rank.

    Attributes:
        q, k: [B, T, H, K].
        v: [B, T, H_v, V], H_v a multiple of H.
        beta: [B, T, H_v], in [0, 2], in the state's dtype.
        g: log-decay <= 0 in the state's dtype: None (DeltaNet), [B, T, H_v] (Gated DeltaNet) or [B, T, H_v, K] (KDA).
        scale: factor of the outputs.
        documents: as in `lasp.recurrence.stages.Run`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    scale: float
    documents: Documents | None = None
