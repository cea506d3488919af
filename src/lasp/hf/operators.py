"""transformers' functions over tokens of a sequence, as the operators of this library that do the same over ranks.

Each takes what a mixer's code gives to the function of transformers, by the names there. Which tokens are here and
which documents they belong to comes from the pass, not from the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.halo import short_convolution
from lasp.hf import library
from lasp.hf.context import MixerFrame
from lasp.hf.library import CACHES
from lasp.ops import delta_rule, linear_attention
from lasp.ops.checks import values_unchecked
from lasp.recurrence.inputs import state_dtype

_SILU = ("silu", "swish")


def convolution(
    frame: MixerFrame,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """causal_conv1d_fn: hidden_states [B, C, T], weight [C, W] -> [B, C, T]."""
    shard = _shard(frame)
    sp, documents = frame.split.arguments(shard)
    is_silu = activation in _SILU
    # A cache fills up a shard that is shorter than the convolution.
    hidden_states = hidden_states[..., -shard.lengths[shard.rank] :]
    y, _state = short_convolution(
        hidden_states.mT.to(weight.dtype),
        weight,
        bias,
        activation="silu" if is_silu else None,
        cu_seqlens=documents,
        sp=sp,
    )
    if activation is not None and not is_silu:
        y = library.load("activations").ACT2FN[activation](y)
    return y.to(hidden_states.dtype).mT


def gated_delta_rule(
    frame: MixerFrame,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """torch_chunk_gated_delta_rule, chunk_kimi_delta_attention: [B, T, H, D]; g [B, T, H_v] or [B, T, H_v, K]."""
    sp, documents = frame.split.arguments(_shard(frame))
    with values_unchecked():
        return delta_rule(
            query,
            key,
            value,
            beta,
            g,
            initial_state=initial_state,
            output_final_state=output_final_state,
            normalize_qk=use_qk_l2norm_in_kernel,
            cu_seqlens=documents,
            sp=sp,
            backend=frame.split.backend,
        )


def state_space_scan(
    frame: MixerFrame,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    return_final_states: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba2_chunk_scan: hidden_states [B, T, H, P], dt [B, T, H], A, D, dt_bias [H], B, C [B, T, G, N] -> as x.

    With return_final_states also the states [B, H, P, N].
    """
    sp, documents = frame.split.arguments(_shard(frame))
    dtype = state_dtype(hidden_states.dtype)
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    step = step.clamp(*dt_limit)
    values = (step[..., None] * hidden_states).to(hidden_states.dtype)
    with values_unchecked():
        o, state = linear_attention(
            C,
            B,
            values,
            step * A.to(dtype),
            scale=1.0,
            output_final_state=return_final_states,
            cu_seqlens=documents,
            sp=sp,
            backend=frame.split.backend,
        )
    # Callers take views of it.
    o = (o if D is None else o + D.to(o.dtype)[:, None] * hidden_states).contiguous()
    return o if state is None else (o, state.mT.contiguous())


def lightning_attention(
    frame: MixerFrame, layer: Any, hidden_states: Tensor, *_: Any, **options: Any
) -> tuple[Any, None]:
    """MiniMaxLightningAttention.forward, whose recurrence is a loop in the layer itself: hidden_states [B, T, D]."""
    sp, documents = frame.split.arguments(_shard(frame))
    heads = (layer.num_attention_heads, 3 * layer.head_dim)
    q, k, v = layer.act_fn(layer.qkv_proj(hidden_states)).unflatten(-1, heads).chunk(3, -1)
    # The buffer has the model's dtype, and 16 bits are too few for a decay.
    rate = layer.slope_rate
    if rate.dtype not in (torch.float32, torch.float64):
        rate = layer.get_slope_rate().to(hidden_states.device)  # takes no device in some versions
    cache = next((options[name] for name in CACHES if options.get(name) is not None), None)
    o, state = linear_attention(
        q,
        k,
        v,
        -rate.flatten(),
        scale=1.0,
        output_final_state=cache is not None,
        cu_seqlens=documents,
        sp=sp,
        backend=frame.split.backend,
    )
    if cache is not None:
        cache.set_linear_cache(layer.layer_idx, None if state is None else state.to(q.dtype))
    return layer.out_proj(layer.output_gate(hidden_states).sigmoid() * layer.norm(o.flatten(-2))), None


def no_shortcut(frame: MixerFrame, *_: Any, **__: Any) -> None:
    """mamba2_split_conv1d_scan_combined: the mixer goes by the parts where this returns None."""


def _shard(frame: MixerFrame) -> Any:
    assert frame.shard is not None
    return frame.shard


Operator = Callable[..., Any]
