"""The softmax-attention layer of hybrid models.

B = batch, T = tokens here, D = d_model, H = query heads, H_kv = key and value heads, K, V = their channels.
Its state is not a recurrence's: it is the keys and values of all tokens so far, and grows with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lasp.layers.positions import Rotary
from lasp.softmax import softmax_attention

if TYPE_CHECKING:
    from lasp.sequence import SequenceParallel


class SoftmaxAttention(nn.Module):
    """Causal softmax attention over [B, T, D].

    Args:
        d_model: D.
        num_heads: H.
        key_dim, value_dim: K and V of one head.
        num_kv_heads: H_kv, a divisor of H; H if None.
        rotary: rotate queries and keys by their global positions.
        scale: factor of the scores.
        method: how keys and values cross ranks, "all_gather" or "ulysses"; see `lasp.softmax_attention`.
        backend: the op's.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        num_kv_heads: int | None = None,
        rotary: bool = True,
        scale: float | None = None,
        method: str = "all_gather",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide the {num_heads} query heads, got {num_kv_heads}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.key_dim, self.value_dim = key_dim, value_dim
        self.scale, self.method, self.backend = scale, method, backend
        self.q_proj = nn.Linear(d_model, num_heads * key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, num_kv_heads * key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, num_kv_heads * value_dim, bias=False)
        self.out_proj = nn.Linear(num_heads * value_dim, d_model, bias=False)
        self.positions = Rotary(key_dim) if rotary else None

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
        """Attend.

        Args:
            x: [B, T, D].
            start: global position of x's first token.
            state: [B, tokens, H_kv, K + V] of x's dtype, rotated keys beside values of what came before the whole
                sequence, the same on every rank.
            output_state: also return the state after the whole sequence, in the same form.
            cu_seqlens: of packed documents, global; see `lasp.linear_attention`.
            sp: the ranks that share the sequence.

        Returns:
            y [B, T, D] and the state, or None unless asked for.
        """
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.key_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.value_dim))
        if self.positions is not None:
            q, k = self.positions(q, k, start)
        o, state = softmax_attention(
            q,
            k,
            v,
            scale=self.scale,
            initial_state=state,
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
            sp=sp,
            method=self.method,
            backend=self.backend,
        )
        return self.out_proj(o.flatten(-2)), state
