"""Mamba-2's layer: the state-space dual (SSD) as linear attention with a gate per head.

The recurrence h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t^T, y_t = C_t h_t + D x_t (Dao & Gu, arXiv 2405.21060) is
linear attention with queries C, keys B, values dt x and log-decays A dt.

H = heads, P = channels of one head, G = groups of heads that share B and C, N = state dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.gates import SteppedDecay
from lasp.layers.norms import SimpleRMSNorm
from lasp.layers.short_convolution import ShortConvolution
from lasp.layers.state import RecurrentState
from lasp.ops import linear_attention

if TYPE_CHECKING:
    from lasp.sequence import SequenceParallel


class Mamba2(nn.Module):
    """Causal SSD over [B, T, D].

    Args:
        d_model: D.
        num_heads: H.
        head_dim: P; the inner width is H * P, usually 2 D.
        state_dim: N.
        num_groups: G, a divisor of H.
        conv_width: of the short convolution over x, B and C.
        norm_eps: added to the mean square in the gated norm.
        backend: the op's.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        head_dim: int,
        state_dim: int,
        num_groups: int = 1,
        conv_width: int = 4,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads % num_groups:
            raise ValueError(f"num_heads {num_heads} must be a multiple of num_groups {num_groups}")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_groups, self.state_dim = num_groups, state_dim
        self.backend = backend
        inner, shared = num_heads * head_dim, num_groups * state_dim
        self.widths = [inner, inner + 2 * shared, num_heads]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(inner + 2 * shared, conv_width, bias=True)
        self.decay = SteppedDecay(num_heads)
        self.skip = nn.Parameter(torch.ones(num_heads))
        # Statistics over each group's channels, a gain for every channel.
        self.norm = SimpleRMSNorm(inner // num_groups, norm_eps)
        self.gain = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def reset_parameters(self) -> None:
        """Those of the layer itself; its modules have their own."""
        nn.init.ones_(self.skip)
        nn.init.ones_(self.gain)

    def forward(
        self,
        x: Tensor,
        *,
        start: int = 0,
        state: RecurrentState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        sp: SequenceParallel | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """As `LinearAttention.forward`; the state's memory is [B, H, N, P]. It has no use for `start`."""
        z, mixed, dt = self.in_proj(x).split(self.widths, -1)
        mixed, window = self.convolution(
            mixed,
            state=None if state is None else state.window,
            output_state=output_state,
            cu_seqlens=cu_seqlens,
            sp=sp,
        )
        inner, shared = self.num_heads * self.head_dim, self.num_groups * self.state_dim
        values, keys, queries = mixed.split([inner, shared, shared], -1)
        values = values.unflatten(-1, (self.num_heads, self.head_dim))
        keys, queries = (t.unflatten(-1, (self.num_groups, self.state_dim)) for t in (keys, queries))
        dt, log_decay = self.decay(dt)
        y, memory = linear_attention(
            queries,
            keys,
            (dt[..., None] * values).to(values.dtype),
            log_decay,
            scale=1.0,
            initial_state=None if state is None else state.memory,
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
            sp=sp,
            backend=self.backend,
        )
        y = (y + self.skip.to(y.dtype)[:, None] * values).flatten(-2) * F.silu(z)
        y = self.norm(y.unflatten(-1, (self.num_groups, -1))).flatten(-2) * self.gain.to(y.dtype)
        return self.out_proj(y), None if memory is None or window is None else RecurrentState(memory, window)
