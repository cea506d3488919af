"""The linear-attention layer: projections, feature maps, positions, decay, normalisation, output gate.

B = batch, T = tokens here, D = d_model, H = heads, K = key dim per head, V = value dim per head.
The layer is single-device code. Under sequence parallelism T is this rank's share, `sp` goes to the op untouched
and the caller gives the global position of the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.decay import ConstantDecay
from lasp.layers.feature_maps import NON_NEGATIVE
from lasp.layers.feature_maps import feature_map as new_feature_map
from lasp.layers.norms import SimpleRMSNorm
from lasp.layers.positions import LRPE, Rotary
from lasp.ops import linear_attention_begin, normalized_linear_attention_begin
from lasp.recurrence.inputs import state_dtype

if TYPE_CHECKING:
    from lasp.sequence import SequenceParallel


def _identity(x: Tensor) -> Tensor:
    return x


# By name, so that models can be pickled.
GATES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "linear": _identity,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
POSITIONS = ("none", "rotary", "lrpe")
NORMALIZATIONS = ("head", "hidden", "denominator")


class LinearAttention(nn.Module):
    """Causal linear attention over [B, T, D].

    Args:
        d_model: D.
        num_heads: H.
        key_dim, value_dim: K and V of one head.
        feature_map: a name in FEATURE_MAPS, applied to queries and keys.
        positions: "none", "rotary", or "lrpe" (which doubles K inside the op).
        log_decay: H natural-log decays <= 0, or None for no decay.
        normalization: "head" or "hidden" normalises each output by its root mean square, over the head's V
            channels (RetNet) or over all H * V (TransNormerLLM); "denominator" divides it by the sum of its
            scores (Linear Transformer).
        gate: activation of the output gate, a name in GATES; "none" for no gate.
        scale: factor of the scores.
        norm_eps: epsilon of the output norm; the denominator has 1e-6.
        backend: the op's.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        feature_map: str = "identity",
        positions: str = "none",
        log_decay: Sequence[float] | None = None,
        normalization: str = "hidden",
        gate: str = "none",
        scale: float = 1.0,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_choice("positions", positions, POSITIONS)
        _check_choice("normalization", normalization, NORMALIZATIONS)
        _check_choice("gate", gate, tuple(GATES))
        check_denominator(normalization, feature_map, positions)
        if log_decay is not None and len(log_decay) != num_heads:
            raise ValueError(f"log_decay must have one value for each of {num_heads} heads, got {len(log_decay)}")
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.normalization = normalization
        self.gate = GATES[gate]
        self.scale = scale
        self.backend = backend
        self.q_proj = nn.Linear(d_model, num_heads * key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, num_heads * key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, num_heads * value_dim, bias=False)
        self.gate_proj = nn.Linear(d_model, num_heads * value_dim, bias=False) if self.gate else None
        self.out_proj = nn.Linear(num_heads * value_dim, d_model, bias=False)
        self.q_map = new_feature_map(feature_map, num_heads, key_dim)
        self.k_map = new_feature_map(feature_map, num_heads, key_dim)
        self.positions = _positions(positions, num_heads, self.q_map.dim_out)
        self.decay = None if log_decay is None else ConstantDecay(log_decay)
        normalized_dim = {"head": value_dim, "hidden": num_heads * value_dim}.get(normalization)
        self.norm = None if normalized_dim is None else SimpleRMSNorm(normalized_dim, norm_eps)

    @property
    def state_dims(self) -> tuple[int, int, int]:
        """(H, K, V) of the state: K after feature map and positions, V with the denominator's extra column."""
        key_dim = self.q_map.dim_out if self.positions is None else self.positions.dim_out
        return self.num_heads, key_dim, self.value_dim + (self.normalization == "denominator")

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
            state: [B, *state_dims] in fp32 (fp64 for fp64 x), what came before the whole sequence; zero if None.
            output_state: also return the state after the whole sequence, in the same form.
            cu_seqlens: of packed documents, global; see `lasp.linear_attention`.
            sp: the ranks that share the sequence.

        Returns:
            y [B, T, D] and the state, or None unless asked for.
        """
        keys, values = (self.num_heads, self.key_dim), (self.num_heads, self.value_dim)
        k = self.k_map(self.k_proj(x).unflatten(-1, keys))
        v = self.v_proj(x).unflatten(-1, values)
        if self.positions is not None:
            gate, q = self._gate_and_queries(x)
            q, k = self.positions(q, k, start)
        begin = normalized_linear_attention_begin if self.normalization == "denominator" else linear_attention_begin
        pending = begin(
            k,
            v,
            None if self.decay is None else self.decay(state_dtype(k.dtype)),
            scale=self.scale,
            initial_state=state,
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
            sp=sp,
            backend=self.backend,
        )
        # What no other rank waits for hides the exchange.
        if self.positions is None:
            gate, q = self._gate_and_queries(x)
        o, final_state = pending.finish(q)
        if self.norm is not None and self.normalization == "head":
            o = self.norm(o)
        o = o.flatten(-2)
        if self.norm is not None and self.normalization == "hidden":
            o = self.norm(o)
        if gate is not None:
            o = gate * o
        return self.out_proj(o), final_state

    def _gate_and_queries(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        gate = None if self.gate is None or self.gate_proj is None else self.gate(self.gate_proj(x))
        return gate, self.q_map(self.q_proj(x).unflatten(-1, (self.num_heads, self.key_dim)))


def check_denominator(normalization: str, feature_map: str, positions: str) -> None:
    """Raise ValueError where scores could be negative, so that their sum is no denominator."""
    if normalization != "denominator":
        return
    if feature_map not in NON_NEGATIVE:
        raise ValueError(
            f"normalization 'denominator' divides by the sum of scores, which feature map {feature_map!r} can make "
            f"zero or negative; use one of {', '.join(sorted(NON_NEGATIVE))}, or normalization 'head' or 'hidden'"
        )
    if positions != "none":
        raise ValueError(
            f"normalization 'denominator' divides by the sum of scores, which {positions!r} positions can make zero "
            "or negative; use positions 'none' here (a model's 'sinusoidal' ones are added to the embeddings)"
        )


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def _positions(name: str, num_heads: int, head_dim: int) -> Rotary | LRPE | None:
    if name == "none":
        return None
    return Rotary(head_dim) if name == "rotary" else LRPE(num_heads, head_dim)
