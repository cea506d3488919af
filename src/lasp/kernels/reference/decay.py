"""The decay family token by token: the definition that every other backend is compared with.

Works in the state's dtype throughout (fp64 for fp64 inputs). Slow by design; gradients come from autograd through
the loop, so nothing here shares a derivation with the chunked backends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.algebra import Summary
from lasp.recurrence.contract import Run
from lasp.recurrence.decay import state_dtype, state_shape, transition

GROUPED_HEADS = False


def _decay(g: Tensor | None, t: int) -> Tensor | float:
    """exp(g) at token t, ready to multiply a state [B, H, K, V]."""
    if g is None:
        return 1.0
    if g.dim() == 1:
        return g.exp()[None, :, None, None]
    return g[:, t].exp()[..., None, None] if g.dim() == 3 else g[:, t].exp()[..., None]


def _loop(x: Run, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(x.q.shape[1]):
        q, k, v = (tensor[:, t].to(state.dtype) for tensor in (x.q, x.k, x.v))
        state = _decay(x.g, t) * state + k[..., :, None] * v[..., None, :]
        outputs.append(x.scale * (q[..., None, :] @ state).squeeze(-2))
    o = torch.stack(outputs, 1) if outputs else x.v.to(state.dtype)
    return o.to(x.v.dtype), state


def _zero_state(x: Run) -> Tensor:
    return x.q.new_zeros(state_shape(x), dtype=state_dtype(x.q.dtype))


def summarize(x: Run) -> tuple[Summary, None]:
    return Summary(transition(x), _loop(x, _zero_state(x))[1]), None


def local_outputs(x: Run, totals: None) -> None:
    return None


def outputs(x: Run, totals: None, partial: None, state_in: Tensor) -> tuple[Tensor, Tensor]:
    return _loop(x, state_in)[0], state_in


def summarize_adjoint(x: Run, d_o: Tensor) -> tuple[Summary, None]:
    d_state = _zero_state(x)
    for t in reversed(range(x.q.shape[1])):
        q, d = x.q[:, t].to(d_state.dtype), d_o[:, t].to(d_state.dtype)
        d_state = _decay(x.g, t) * (d_state + x.scale * q[..., :, None] * d[..., None, :])
    return Summary(transition(x).adjoint(), d_state), None


def local_gradients(x: Run, saved: Tensor, totals_adjoint: None, d_o: Tensor) -> None:
    return None


def gradients(
    x: Run, saved: Tensor, totals_adjoint: None, local: None, d_o: Tensor, d_state_out: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    g = None if x.g is None else x.g.detach().requires_grad_()
    wanted = [q, k, v] if g is None else [q, k, v, g]
    with torch.enable_grad():
        o, state_out = _loop(Run(q, k, v, g, x.scale), saved)
        result = (
            torch.autograd.grad(
                (o, state_out),
                wanted,
                (d_o.to(o.dtype), d_state_out),
                allow_unused=True,
                materialize_grads=True,
            )
            if x.q.shape[1]
            else tuple(torch.zeros_like(t) for t in wanted)
        )
    return (*result, None) if g is None else tuple(result)
