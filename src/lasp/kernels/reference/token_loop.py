"""Any recurrence token by token: the definition that every other backend is compared with.

Works in the state's dtype throughout (fp64 for fp64 inputs). Slow by design. Gradients come from autograd through
the loop, so nothing here shares a derivation with the chunked backends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lasp.algebra import Summary, Transition
from lasp.recurrence.decay import state_dtype, state_shape


class TokenLoop:
    """The stages of the recurrence whose tokens are given, one summary each.

    Args:
        token: (x, t, dtype) -> the affine map of token t, in dtype. x is a NamedTuple that begins with q, k, v and
            ends with scale.
    """

    GROUPED_HEADS = False

    def __init__(self, token: Callable[[Any, int, torch.dtype], Summary]) -> None:
        self._token = token

    def summarize(self, x: Any) -> tuple[Summary, None]:
        zero = _zero_state(x)
        return Summary(self._transition(x, zero), self._loop(x, zero)[1]), None

    def local_outputs(self, x: Any, totals: None) -> None:
        return None

    def outputs(self, x: Any, totals: None, partial: None, state_in: Tensor) -> tuple[Tensor, Tensor]:
        return self._loop(x, state_in)[0], state_in

    def summarize_adjoint(self, x: Any, d_o: Tensor) -> tuple[Summary, None]:
        d_state = _zero_state(x)
        for t in reversed(range(x.q.shape[1])):
            q, d = x.q[:, t].to(d_state.dtype), d_o[:, t].to(d_state.dtype)
            transition = self._token(x, t, d_state.dtype).transition
            d_state = transition.adjoint().apply(d_state + x.scale * q[..., :, None] * d[..., None, :])
        return Summary(self._transition(x, d_state).adjoint(), d_state), None

    def local_gradients(self, x: Any, saved: Tensor, totals_adjoint: None, d_o: Tensor) -> None:
        return None

    def gradients(
        self, x: Any, saved: Tensor, totals_adjoint: None, local: None, d_o: Tensor, d_state_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        tensors = [None if t is None else t.detach().requires_grad_() for t in x[:-1]]
        with torch.enable_grad():
            o, state_out = self._loop(type(x)(*tensors, x.scale), saved)
            # A zero that depends on everything: without tokens nothing else would.
            o = o + sum((t.sum() * 0 for t in tensors if t is not None), start=o.new_zeros(()))
            found = torch.autograd.grad(
                (o, state_out + o.sum() * 0), [t for t in tensors if t is not None], (d_o.to(o.dtype), d_state_out)
            )
        gradients = iter(found)
        return tuple(None if t is None else next(gradients) for t in tensors)

    def _loop(self, x: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(x.q.shape[1]):
            state = self._token(x, t, state.dtype).apply(state)
            outputs.append(x.scale * (x.q[:, t].to(state.dtype)[..., None, :] @ state).squeeze(-2))
        o = torch.stack(outputs, 1) if outputs else x.v.to(state.dtype)
        return o.to(x.v.dtype), state

    def _transition(self, x: Any, state: Tensor) -> Transition:
        """The product of the tokens' transitions."""
        tokens = [self._token(x, t, state.dtype).transition for t in range(x.q.shape[1])]
        if not tokens:
            # An empty run has its recurrence's kind of transition; a token of zeros tells which.
            empty = type(x)(
                *(t if t is None or t.dim() == 1 else t.new_zeros(t.shape[0], 1, *t.shape[2:]) for t in x[:-1]), x.scale
            )
            return type(self._token(empty, 0, state.dtype).transition).identity(state)
        product = tokens[0]
        for transition in tokens[1:]:
            product = transition.compose(product)
        return product


def _zero_state(x: Any) -> Tensor:
    return x.q.new_zeros(state_shape(x), dtype=state_dtype(x.q.dtype))
