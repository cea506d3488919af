"""Gated linear attention: a decay per key channel, learned from the input (Yang et al., arXiv 2312.06635)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.gates import GatedHeadNorm, LowRank
from lasp.ops import linear_attention_begin
from lasp.recurrence.inputs import state_dtype

if TYPE_CHECKING:
    from lasp.sequence import SequenceParallel

# The paper's temperature: decays are the 16th root of a sigmoid, so that they start slow.
GATE_TEMPERATURE = 16.0


class GatedLinearAttention(nn.Module):
    """Causal GLA over [B, T, D], with a silu output gate.

    Args:
        d_model: D.
        num_heads: H.
        key_dim, value_dim: K and V of one head; as published H * K = D / 2 and H * V = D.
        gate_rank: rank of the decays' projection.
        norm_eps: added to the mean square in the output norm.
        backend: the op's.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        gate_rank: int = 16,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.backend = backend
        self.q_proj = nn.Linear(d_model, num_heads * key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, num_heads * key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, num_heads * value_dim, bias=False)
        self.decay_proj = LowRank(d_model, gate_rank, num_heads * key_dim, bias=True)
        self.gate_proj = nn.Linear(d_model, num_heads * value_dim, bias=False)
        self.norm = GatedHeadNorm(value_dim, norm_eps, F.silu)
        self.out_proj = nn.Linear(num_heads * value_dim, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        start: int = 0,
        state: Tensor | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        sp: SequenceParallel | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `LinearAttention.forward`; it has no use for `start`."""
        keys, values = (self.num_heads, self.key_dim), (self.num_heads, self.value_dim)
        decay = self.decay_proj(x)
        pending = linear_attention_begin(
            self.k_proj(x).unflatten(-1, keys),
            self.v_proj(x).unflatten(-1, values),
            F.logsigmoid(decay.to(state_dtype(decay.dtype))).unflatten(-1, keys) / GATE_TEMPERATURE,
            initial_state=state,
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
            sp=sp,
            backend=self.backend,
        )
        # What no other rank waits for hides the exchange.
        gate, q = self.gate_proj(x), self.q_proj(x).unflatten(-1, keys)
        o, state = pending.finish(q)
        return self.out_proj(self.norm(o, gate)), state
