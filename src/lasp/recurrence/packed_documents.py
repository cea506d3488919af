"""Joins the states of a rank's sequences or documents with the one state that crosses ranks.

The stages know a state for every sequence of the batch, or for every document here; the exchange knows the state
that crosses a rank border. Without packing these are the same. With packed documents only the document that lies on
the border crosses it: a document boundary inside a shard is a zero transition, so no exchange knows of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lasp.algebra import Summary
from lasp.recurrence.documents import Documents


def _border(parts: Summary, own: Tensor | None, enters: bool, leaves: bool, first: bool) -> Summary:
    """The shard as seen by what crosses its borders, [1, H, K, V].

    Args:
        parts: summaries of the documents here, in the direction of the exchange's far border `first` or last.
        own: [n, H, K, V], what enters each document from within this rank; zero if None.
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
    forgets = type(part.transition).zero(part.state)
    if not leaves:
        return Summary(forgets, torch.zeros_like(part.state))
    return Summary(forgets, part.state if own is None else part.apply(own[index]))


class SumOverRanks(Protocol):
    """The ranks that share the sequence."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in their order."""
        ...


def zero_finals(documents: Documents | None, summary: Summary) -> Tensor:
    """Zeros of the final states' shape: one for each sequence of the batch or document of the whole sequence."""
    count = summary.state.shape[0] if documents is None else documents.count
    return summary.state.new_zeros(count, *summary.state.shape[1:])


class PackedDocuments:
    """Documents one after another in a single sequence, on one device or over the ranks of `ranks`.

    N documents in the whole sequence, n on this rank. Initial states and gradients of final ones, [N, H, K, V], are
    zero if None. Nothing enters the exchange from outside: what enters a document does so within the rank where it
    starts.
    """

    def __init__(self, documents: Documents, ranks: SumOverRanks | None) -> None:
        self._documents, self._ranks = documents, ranks

    def leaving(self, parts: Summary, initial: Tensor | None) -> Summary:
        """This rank's summary, [1, H, K, V], of those of the documents here."""
        d = self._documents
        return _border(parts, self._here(initial), d.from_before, d.to_after, first=False)

    def entering(self, carried: Tensor | None, initial: Tensor | None) -> Tensor | None:
        """[n, H, K, V], the state that enters each document here; `carried`, [1, H, K, V], came from other ranks."""
        own = self._here(initial)
        if not self._documents.from_before:
            return own
        assert carried is not None
        return torch.cat([carried, self._others(carried) if own is None else own[1:]])

    def final(self, leaving: Tensor, initial: Tensor | None) -> Tensor:
        """[N, H, K, V], every document's final state, on every rank, given what leaves each document here."""
        return self._with_empty(self._spread(leaving, self._documents.ending), initial)

    def leaving_adjoint(self, parts: Summary, d_final: Tensor | None) -> Summary:
        """This rank's summary of gradients, which cross it from its end to its start."""
        d = self._documents
        return _border(parts, self._here(d_final), d.to_after, d.from_before, first=True)

    def entering_adjoint(self, carried: Tensor | None, d_final: Tensor | None) -> Tensor | None:
        """[n, H, K, V], the gradient of the state that leaves each document here."""
        own = self._here(d_final)
        if not self._documents.to_after:
            return own
        assert carried is not None
        return torch.cat([self._others(carried) if own is None else own[:-1], carried])

    def initial(self, d_entering: Tensor, d_final: Tensor | None) -> Tensor:
        """[N, H, K, V], the gradient of every document's initial state, on every rank, given that of the state which
        enters each document here."""
        return self._with_empty(self._spread(d_entering, self._documents.starting), d_final)

    def _here(self, values: Tensor | None) -> Tensor | None:
        """Rows of `values` for the documents on this rank."""
        if values is None or len(self._documents.ids) == self._documents.count:
            return values  # all of them: no copy, and no index for a GPU to be sent
        return values[list(self._documents.ids)]

    def _others(self, carried: Tensor) -> Tensor:
        """Zeros for the documents here but one."""
        return carried.new_zeros(len(self._documents.ids) - 1, *carried.shape[1:])

    def _spread(self, values: Tensor, wanted: Sequence[int]) -> Tensor:
        """Share documents' values. Ranks together know all but those of empty documents, which are zero."""
        d = self._documents
        if self._ranks is None and len(wanted) == d.count:
            return values
        whole = values.new_zeros(d.count, *values.shape[1:])
        whole[[d.ids[position] for position in wanted]] = values[list(wanted)]
        # The others' entries are zero, so the sum changes no bits.
        return whole if self._ranks is None else self._ranks.sum(whole)

    def _with_empty(self, spread: Tensor, values: Tensor | None) -> Tensor:
        """`spread` with `values` at the empty documents: what enters them leaves them."""
        empty = list(self._documents.empty)
        if empty and values is not None:
            spread[empty] = values[empty]
        return spread
