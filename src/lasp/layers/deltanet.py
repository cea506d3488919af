"""The delta rule's layers: DeltaNet, Gated DeltaNet, Kimi Delta Attention. They differ in their gates.

| | decay | output gate | beta |
|---|---|---|---|
| DeltaNet (arXiv 2406.06484) | none | none | sigmoid |
| Gated DeltaNet (arXiv 2412.06464) | per head | silu | sigmoid |
| KDA (arXiv 2510.26692) | per key channel, through a low rank | sigmoid, through a low rank | sigmoid |

All have a short convolution with SiLU over queries, keys and values, keys and queries of length 1, and an RMS norm
per head. Twice the sigmoid gives beta in (0, 2) and the state negative eigenvalues (arXiv 2411.12537).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.gates import GatedHeadNorm, LowRank, SteppedDecay
from lasp.layers.short_convolution import ShortConvolution
from lasp.layers.state import RecurrentState
from lasp.ops import delta_rule

if TYPE_CHECKING:
    from lasp.sequence import SequenceParallel

DECAYS = ("none", "head", "channel")
OUTPUT_GATES = {"none": None, "silu": F.silu, "sigmoid": torch.sigmoid}


class DeltaNet(nn.Module):
    """Causal delta-rule attention over [B, T, D].

    Args:
        d_model: D.
        num_heads: H_v, heads of values, betas and decays.
        key_dim, value_dim: K and V of one head.
        num_key_heads: H, heads of queries and keys, a divisor of H_v; H_v if None.
        decay: "none" (DeltaNet), "head" (Gated DeltaNet) or "channel" (KDA, whose projection has rank V).
        output_gate: "none", "silu" or "sigmoid".
        gate_rank: rank of the output gate's projection, which then has a bias; full rank if None.
        negative_eigenvalues: beta up to 2 instead of 1.
        conv_width: of the short convolution.
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
        num_key_heads: int | None = None,
        decay: str = "none",
        output_gate: str = "none",
        gate_rank: int | None = None,
        negative_eigenvalues: bool = False,
        conv_width: int = 4,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        key_heads = num_heads if num_key_heads is None else num_key_heads
        if num_heads % key_heads:
            raise ValueError(f"num_heads {num_heads} must be a multiple of num_key_heads {key_heads}")
        for name, value, known in (("decay", decay, DECAYS), ("output_gate", output_gate, tuple(OUTPUT_GATES))):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        self.num_heads, self.key_heads, self.key_dim, self.value_dim = num_heads, key_heads, key_dim, value_dim
        self.max_beta = 2.0 if negative_eigenvalues else 1.0
        self.backend = backend
        keys, values = key_heads * key_dim, num_heads * value_dim
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.convolution = ShortConvolution(2 * keys + values, conv_width)
        self.beta_proj = nn.Linear(d_model, num_heads, bias=False)
        self.decay_proj: nn.Module | None = None
        self.decay: SteppedDecay | None = None
        if decay == "head":
            self.decay_proj, self.decay = nn.Linear(d_model, num_heads, bias=False), SteppedDecay(num_heads)
        elif decay == "channel":
            self.decay_proj = LowRank(d_model, value_dim, num_heads * key_dim)
            self.decay = SteppedDecay(num_heads, key_dim)
        self.gate_proj: nn.Module | None = None
        if output_gate != "none" and gate_rank is None:
            self.gate_proj = nn.Linear(d_model, values, bias=False)
        elif output_gate != "none":
            self.gate_proj = LowRank(d_model, gate_rank or value_dim, values, bias=True)
        self.norm = GatedHeadNorm(value_dim, norm_eps, OUTPUT_GATES[output_gate])
        self.out_proj = nn.Linear(values, d_model, bias=False)

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
        """As `LinearAttention.forward`; the state's memory is [B, H_v, K, V]. It has no use for `start`."""
        # One convolution over the three, so that one message carries what it needs across ranks.
        mixed, window = self.convolution(
            torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1),
            state=None if state is None else state.window,
            output_state=output_state,
            cu_seqlens=cu_seqlens,
            sp=sp,
        )
        keys, values = (self.key_heads, self.key_dim), (self.num_heads, self.value_dim)
        q, k, v = mixed.split([keys[0] * keys[1], keys[0] * keys[1], values[0] * values[1]], -1)
        log_decay = None
        if self.decay is not None and self.decay_proj is not None:
            _, log_decay = self.decay(self.decay_proj(x))
        o, memory = delta_rule(
            q.unflatten(-1, keys),
            k.unflatten(-1, keys),
            v.unflatten(-1, values),
            self.max_beta * self.beta_proj(x).sigmoid(),
            log_decay,
            initial_state=None if state is None else state.memory,
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
            sp=sp,
            backend=self.backend,
            normalize_qk=True,
        )
        gate = None if self.gate_proj is None else self.gate_proj(x)
        y = self.out_proj(self.norm(o, gate))
        return y, None if memory is None or window is None else RecurrentState(memory, window)
