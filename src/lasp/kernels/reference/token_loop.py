"""Any recurrence token by token: the definition that every other backend is compared with.

Works in the state's dtype throughout (fp64 for fp64 inputs). Slow by design. Gradients come from autograd through
the loop, so nothing here shares a derivation with the chunked backends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.algebra import Summary, Transition
from lasp.recurrence.inputs import Inputs, as_given, num_states, state_dtype, state_shape
from lasp.recurrence.pullback import pull_back
from lasp.recurrence.stages import Saved, Stages

_Inputs = TypeVar("_Inputs", bound=Inputs)


class TokenLoop(Generic[_Inputs]):
    """The stages of the recurrence whose tokens are given, one summary each.

    Args:
        token: (x, t, dtype) -> the affine map of token t, in dtype.
    """

    def __init__(self, token: Callable[[_Inputs, int, torch.dtype], Summary]) -> None:
        self._token = token

    def summarize(self, x: _Inputs) -> tuple[Summary, None]:
        zero = _zero_state(x)
        return Summary(self._transition(x, zero), self._loop(x, zero)[1]), None

    def local_outputs(self, x: _Inputs, totals: None) -> None:
        return None

    def outputs(self, x: _Inputs, totals: None, partial: None, state_in: Tensor) -> tuple[Tensor, Saved]:
        return self._loop(x, state_in)[0], (state_in,)

    def summarize_adjoint(self, x: _Inputs, saved: Saved, d_o: Tensor) -> tuple[Summary, None]:
        d_state = _zero_state(x)
        ends = []
        for part, d, (first, last) in zip(_parts(x), _pieces(x, d_o), _rows(x), strict=True):
            d_part = d_state[first:last]
            for t in reversed(range(part.q.shape[1])):
                outer = part.q[:, t].to(d_part.dtype)[..., :, None] * d[:, t].to(d_part.dtype)[..., None, :]
                d_part = self._token(part, t, d_part.dtype).transition.adjoint().apply(d_part + x.scale * outer)
            ends.append(d_part)
        return Summary(self._transition(x, d_state).adjoint(), torch.cat(ends) if ends else d_state), None

    def local_gradients(self, x: _Inputs, saved: Saved, totals_adjoint: None, d_o: Tensor) -> None:
        return None

    def gradients(
        self, x: _Inputs, saved: Saved, totals_adjoint: None, local: None, d_o: Tensor, d_state_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        tensors = [None if t is None else t.detach().requires_grad_() for t in x.tensors()]
        with torch.enable_grad():
            o, state_out = self._loop(x.with_tensors(tensors), *saved)
            # A zero that depends on everything: without tokens nothing else would.
            zero = sum((t[:0].sum() for t in tensors if t is not None), start=o.new_zeros(()))
            found = pull_back(
                (o + zero, state_out + zero), [t for t in tensors if t is not None], (d_o.to(o.dtype), d_state_out)
            )
        gradients = iter(found)
        return tuple(None if t is None else next(gradients) for t in tensors)

    def stages(self) -> Stages[_Inputs, _Inputs, None, None, None, None]:
        return Stages(
            prepare=as_given,
            summarize=self.summarize,
            local_outputs=self.local_outputs,
            outputs=self.outputs,
            summarize_adjoint=self.summarize_adjoint,
            local_gradients=self.local_gradients,
            gradients=self.gradients,
            traceable=False,
            erases=True,
        )

    def _loop(self, x: _Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs, states = [x.v[:, :0].to(state.dtype)], []
        for part, (first, last) in zip(_parts(x), _rows(x), strict=True):
            here = state[first:last]
            for t in range(part.q.shape[1]):
                here = self._token(part, t, state.dtype).apply(here)
                outputs.append(x.scale * (part.q[:, t].to(state.dtype)[..., None, :] @ here).transpose(1, 2))
            states.append(here)
        return torch.cat(outputs, 1).to(x.v.dtype), torch.cat(states) if states else state

    def _transition(self, x: _Inputs, state: Tensor) -> Transition:
        """The product of the tokens' transitions, of each sequence or document."""
        # Of a token of zeros: a rank without tokens, or documents, has its recurrence's kind of transition too.
        identity = self._token(_padded(x), x.q.shape[1], state.dtype).transition.identity
        products = []
        for part in _parts(x):
            product = identity(state.new_empty(part.q.shape[0], *state.shape[1:]))
            for t in range(part.q.shape[1]):
                product = self._token(part, t, state.dtype).transition.compose(product)
            products.append(product)
        if not products:
            return identity(state)
        tensors = zip(*(product.tensors() for product in products), strict=True)
        return type(products[0])(*(torch.cat(several) for several in tensors))


def _parts(x: _Inputs) -> list[_Inputs]:
    """The run itself, or each of its documents as a run of one sequence."""
    if x.documents is None:
        return [x]
    return [
        _alone(x, [t if t is None or t.dim() == 1 else t[:, start:end] for t in x.tensors()])
        for start, end in x.documents.spans
    ]


def _pieces(x: _Inputs, tensor: Tensor) -> list[Tensor]:
    return [tensor] if x.documents is None else [tensor[:, start:end] for start, end in x.documents.spans]


def _rows(x: _Inputs) -> list[tuple[int, int]]:
    """First and last + 1 state of each part of the batch."""
    return [(0, x.q.shape[0])] if x.documents is None else [(n, n + 1) for n in range(num_states(x))]


def _padded(x: _Inputs) -> _Inputs:
    """x without documents, and with a token of zeros behind."""
    tensors = [t if t is None or t.dim() == 1 else pad(t, [0, 0] * (t.dim() - 2) + [0, 1]) for t in x.tensors()]
    return _alone(x, tensors)


def _alone(x: _Inputs, tensors: Sequence[Tensor | None]) -> _Inputs:
    """The tensors as those of a run of sequences, without documents."""
    return x.with_tensors(tensors)._replace(documents=None)  # type: ignore[attr-defined, no-any-return]


def _zero_state(x: _Inputs) -> Tensor:
    return x.q.new_zeros(state_shape(x), dtype=state_dtype(x.q.dtype))
