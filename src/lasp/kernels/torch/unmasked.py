"""Linear attention without a mask: o_t = scale q_t S, S = sum over the whole sequence of k_s v_s^T.

Two matrix products, which PyTorch's own library does best on every device; there is nothing to fuse. The state
that enters `outputs` is the one after all ranks, and its gradient likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.algebra import Identity, Summary
from lasp.recurrence.inputs import DecayInputs, state_dtype
from lasp.recurrence.stages import Saved, Stages, as_given


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_T left_t right_t^T: [B, T, H, K], [B, T, H, V] -> [B, H, K, V]."""
    return torch.einsum("bthk,bthv->bhkv", left.to(dtype), right.to(dtype))


def summarize(x: DecayInputs) -> tuple[Summary, None]:
    return Summary(Identity(), _product(x.k, x.v, state_dtype(x.q.dtype))), None


def local_outputs(x: DecayInputs, totals: None) -> None:
    return None


def outputs(x: DecayInputs, totals: None, partial: None, state_in: Tensor) -> tuple[Tensor, Saved]:
    o = x.scale * torch.einsum("bthk,bhkv->bthv", x.q.to(state_in.dtype), state_in)
    return o.to(x.v.dtype), (state_in,)


def summarize_adjoint(x: DecayInputs, saved: Saved, d_o: Tensor) -> tuple[Summary, None]:
    return Summary(Identity(), x.scale * _product(x.q, d_o, state_dtype(x.q.dtype))), None


def local_gradients(x: DecayInputs, saved: Saved, totals_adjoint: None, d_o: Tensor) -> Tensor:
    (state,) = saved
    return x.scale * torch.einsum("bthv,bhkv->bthk", d_o.to(state.dtype), state)


def gradients(
    x: DecayInputs, saved: Saved, totals_adjoint: None, local: Tensor, d_o: Tensor, d_state_out: Tensor
) -> tuple[Tensor | None, ...]:
    dk = torch.einsum("bthv,bhkv->bthk", x.v.to(d_state_out.dtype), d_state_out)
    dv = torch.einsum("bthk,bhkv->bthv", x.k.to(d_state_out.dtype), d_state_out)
    return local.to(x.q.dtype), dk.to(x.k.dtype), dv.to(x.v.dtype), None


STAGES = Stages(
    prepare=as_given,
    summarize=summarize,
    local_outputs=local_outputs,
    outputs=outputs,
    summarize_adjoint=summarize_adjoint,
    local_gradients=local_gradients,
    gradients=gradients,
)
