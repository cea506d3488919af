"""How the states of a rank's sequences or documents meet the one state that crosses ranks.

The stages know a state for every sequence of the batch, or for every document here; the exchange knows the state
that crosses a rank border. Without packing these are the same. With packed documents only the document that lies on
the border crosses it: a document boundary inside a shard is a zero transition, so no exchange knows of documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lasp.algebra import Summary
from lasp.recurrence.documents import Documents
from lasp.sequence import SequenceParallel


def _border(parts: Summary, own: Tensor, enters: bool, leaves: bool, first: bool) -> Summary:
    """The shard as seen by what crosses its borders, [1, H, K, V].

    Args:
        parts: summaries of the documents here, in the direction of the exchange's far border `first` or last.
        own: [n, H, K, V], what enters each document from within this rank.
        enters: the document at the near border continues from there. leaves: the one at the far border goes on.
        first: the far border is the shard's start (gradients), not its end.
    """
    count = parts.state.shape[0]
    if count == 0:
        state = parts.state.new_zeros(1, *parts.state.shape[1:])
        return Summary(parts.transition.forgettable(state).identity(state), state)
    index = slice(0, 1) if first else slice(count - 1, count)
    part = parts[index]
    part = Summary(part.transition.forgettable(part.state), part.state)
    if count == 1 and enters and leaves:
        return part
    state = part.apply(own[index]) if leaves else torch.zeros_like(part.state)
    return Summary(type(part.transition).zero(state), state)


class Packed:
    """Documents one after another in a single sequence, over the ranks of `sp`."""

    def __init__(self, documents: Documents, sp: SequenceParallel | None) -> None:
        self._documents, self._sp = documents, sp if sp is not None and sp.size > 1 else None

    def leaving(self, parts: Summary, initial: Tensor) -> tuple[Summary, Tensor]:
        """This rank's summary, and the state before the first rank."""
        d = self._documents
        summary = _border(parts, self._here(initial), d.from_before, d.to_after, first=False)
        return summary, torch.zeros_like(summary.state)

    def entering(self, carried: Tensor, initial: Tensor) -> Tensor:
        """[n, H, K, V], the state that enters each document here."""
        own = self._here(initial)
        return torch.cat([carried, own[1:]]) if self._documents.from_before else own

    def final(self, parts: Summary, entering: Tensor) -> Tensor:
        """[N, H, K, V], every document's final state, on every rank; of empty ones their initial state is missing."""
        return self._spread(parts.apply(entering), self._documents.ending)

    def leaving_adjoint(self, parts: Summary, d_final: Tensor) -> tuple[Summary, Tensor]:
        d = self._documents
        summary = _border(parts, self._here(d_final), d.to_after, d.from_before, first=True)
        return summary, torch.zeros_like(summary.state)

    def entering_adjoint(self, carried: Tensor, d_final: Tensor) -> Tensor:
        """[n, H, K, V], the gradient of the state that leaves each document here."""
        own = self._here(d_final)
        return torch.cat([own[:-1], carried]) if self._documents.to_after else own

    def initial(self, parts: Summary, entering: Tensor) -> Tensor:
        """[N, H, K, V], the gradient of every document's initial state, on every rank."""
        return self._spread(parts.apply(entering), self._documents.starting)

    def with_empty(self, spread: Tensor, values: Tensor) -> Tensor:
        """`spread` with `values` at the empty documents: what enters them leaves them."""
        empty = list(self._documents.empty)
        if empty:
            spread[empty] = values[empty]
        return spread

    def _here(self, values: Tensor) -> Tensor:
        """Of the values of all documents those of the documents here."""
        if len(self._documents.ids) == self._documents.count:
            return values  # all of them: no copy, and no index for a GPU to be sent
        return values[list(self._documents.ids)]

    def _spread(self, values: Tensor, wanted: Sequence[int]) -> Tensor:
        """Each rank knows some documents' values; together, all."""
        d = self._documents
        if self._sp is None and len(wanted) == d.count:
            return values
        whole = values.new_zeros(d.count, *values.shape[1:])
        whole[[d.ids[position] for position in wanted]] = values[list(wanted)]
        # The others' entries are zero, so the sum changes no bits.
        return whole if self._sp is None else self._sp.comm.sum(whole)
