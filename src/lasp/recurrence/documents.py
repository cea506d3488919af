"""Places of the documents of a packed sequence: globally, and on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lasp.recurrence.untraced import cached


@dataclass(frozen=True)
class Documents:
    """The documents of which a rank holds tokens.

    Attributes:
        bounds: where they start here, and the end of the last: 0 = bounds[0] < .. < bounds[-1] = tokens here; just
            (0,) where the rank holds none.
        ids: their indices among all documents.
        from_before: the first has tokens on earlier ranks.
        to_after: the last has tokens on later ranks.
        count: number of documents of the whole sequence.
        empty: indices of the documents without tokens anywhere.
        cu_seqlens: of all documents, the same on every rank of the sequence.
    """

    bounds: tuple[int, ...]
    ids: tuple[int, ...]
    from_before: bool
    to_after: bool
    count: int
    empty: tuple[int, ...]
    cu_seqlens: tuple[int, ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Start and end of each document here."""
        return list(pairwise(self.bounds))

    @property
    def starting(self) -> list[int]:
        """Positions in `ids` of the documents that start here."""
        return list(range(int(self.from_before), len(self.ids)))

    @property
    def ending(self) -> list[int]:
        """Positions in `ids` of the documents that end here."""
        return list(range(len(self.ids) - int(self.to_after)))

    @cached_property
    def of_tokens(self) -> Tensor:
        """int64 [T], on the host: which document here each token belongs to."""
        lengths = torch.tensor([end - start for start, end in self.spans], dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.ids)), lengths)

    @cached_property
    def layouts(self) -> dict[Any, Any]:
        """Cache of what kernels made of these documents, by keys of theirs: all layers of a model ask for the same."""
        return {}


@cached(maxsize=64)
def documents_here(cu_seqlens: tuple[int, ...], offset: int, tokens: int) -> Documents:
    """The documents on a rank that holds `tokens` tokens from global index `offset` on.

    cu_seqlens: 0, the end of the first document, of the second, .. and the length of the whole sequence. Every layer
    of a model asks the same, hence the cache.
    """
    bounds, ids, empty = [0], [], []
    from_before = to_after = False
    for index, (start, end) in enumerate(pairwise(cu_seqlens)):
        if start == end:
            empty.append(index)
        here = min(end, offset + tokens) - max(start, offset)
        if here > 0:
            from_before |= start < offset
            to_after |= end > offset + tokens
            ids.append(index)
            bounds.append(bounds[-1] + here)
    return Documents(tuple(bounds), tuple(ids), from_before, to_after, len(cu_seqlens) - 1, tuple(empty), cu_seqlens)
