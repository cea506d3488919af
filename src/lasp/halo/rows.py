"""Plans which rows of a sequence each rank must have before its own, and who holds them.

w = width, how many tokens back are read. Rows are numbered globally: the tokens of the whole sequence 0 .. total - 1,
then the w rows before each document's first token, its initial state: row total + n w + i for document n, oldest
first. NONE is a row of zeros that nobody holds. Every rank computes the rows every rank needs from the shards and the
documents alone, so nothing is asked for: rows are sent.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

NONE = -1


class HaloLayout(NamedTuple):
    """Sizes on which the rows depend.

    Attributes:
        starts: global index of every rank's first token, and the total: size + 1 numbers.
        bounds: where each document starts in the whole sequence, and the total: N + 1 numbers.
        width: w.
        initial: initial states are given.
        final: the last w rows of every document, its initial state before it, are wanted on every rank.
    """

    starts: tuple[int, ...]
    bounds: tuple[int, ...]
    width: int
    initial: bool
    final: bool


class NeededRows(NamedTuple):
    """Rows that one rank needs.

    Attributes:
        rows: int64 [M], rising, without NONE.
        halo: how many of the rows right before its first token are wanted: those of the same document.
    """

    rows: Tensor
    halo: int


def before(layout: HaloLayout, positions: Tensor, documents: Tensor) -> Tensor:
    """The rows at global `positions`, up to w tokens before the start of `documents`, as those documents see them."""
    back = positions - torch.tensor(layout.bounds)[documents]
    if not layout.initial:
        return torch.where(back >= 0, positions, NONE)
    return torch.where(back >= 0, positions, layout.starts[-1] + (documents + 1) * layout.width + back)


def final_rows(layout: HaloLayout) -> Tensor:
    """int64 [N, w], the rows of every document's final state."""
    ends = torch.tensor(layout.bounds[1:])[:, None]
    return before(layout, ends + torch.arange(-layout.width, 0), torch.arange(len(ends))[:, None])


@lru_cache(maxsize=32)
def needed_rows(layout: HaloLayout) -> tuple[NeededRows, ...]:
    """Rows that every rank needs."""
    bounds, width = torch.tensor(layout.bounds), layout.width
    everywhere = [final_rows(layout).flatten()] if layout.final else []
    found = []
    for start, end in pairwise(layout.starts):
        halo, wanted = 0, list(everywhere)
        if end > start:
            document = int(torch.searchsorted(bounds, start, right=True)) - 1
            halo = min(width, start - layout.bounds[document])
            wanted.append(torch.arange(start - halo, start))
        if layout.initial:
            begin, stop = bounds[:-1, None], bounds[1:, None]
            first = (start - begin).clamp(min=0)
            read = (begin + first < stop.clamp(max=end)) & (torch.arange(width) >= first)
            wanted.append(layout.starts[-1] + read.flatten().nonzero()[:, 0])
        rows = torch.cat(wanted).unique() if wanted else torch.empty(0, dtype=torch.int64)
        found.append(NeededRows(rows[rows != NONE], halo))
    return tuple(found)


class Rows:
    """The rows of one layout, for one rank."""

    def __init__(self, layout: HaloLayout, rank: int) -> None:
        self.layout, self.rank = layout, rank
        self.total, self.start, self.end = layout.starts[-1], layout.starts[rank], layout.starts[rank + 1]
        self._bounds = torch.tensor(layout.bounds)
        self.needs = needed_rows(layout)
        self.needed = self.needs[rank]

    def owner(self, rows: Tensor) -> Tensor:
        """The rank that holds each row: of initial states, which all have, the first, which gets their gradient."""
        owner = torch.searchsorted(torch.tensor(self.layout.starts), rows, right=True) - 1
        return torch.where(rows < self.total, owner, 0)

    def exceptions(self) -> tuple[Tensor, Tensor]:
        """Global indices [A] and documents [A] of the tokens here that must not read what stands before them.

        Those are the first w of a document that starts after this rank's first token, or of any that has an initial
        state. The halo of others is zero where their document has not begun.
        """
        begin = self._bounds[:-1]
        positions = begin[:, None] + torch.arange(self.layout.width)
        here = (positions >= self.start) & (positions < self._bounds[1:, None].clamp(max=self.end))
        if not self.layout.initial:
            here &= begin[:, None] > self.start
        documents = torch.arange(len(begin))[:, None].expand_as(positions)
        return positions[here], documents[here]


class Route(NamedTuple):
    """The ways of rows to this rank and from it; indices on the tensors' device.

    Attributes:
        here: (positions in the needed rows, tokens here) of own rows.
        state: (positions in the needed rows, rows of the initial states).
        receives: (rank, positions in the needed rows) for every rank that sends rows here.
        sends: (rank, tokens here) for every rank that wants some.
        state_of: for the first rank, (rank, rows of the initial states) that other ranks use.
        halo: slice of the needed rows that goes right before the first token.
    """

    here: tuple[Tensor, Tensor]
    state: tuple[Tensor, Tensor]
    receives: tuple[tuple[int, Tensor], ...]
    sends: tuple[tuple[int, Tensor], ...]
    state_of: tuple[tuple[int, Tensor], ...]
    halo: slice


class BoundaryOverride(NamedTuple):
    """Tokens whose reads are replaced, and where instead they read j = 0 .. w tokens back; on the tensors' device.

    Attributes:
        tokens: int64 [A], tokens here.
        near: int64 [w + 1, A], tokens here.
        far: int64 [w + 1, A], indices of needed rows, its length for zeros.
        is_near: bool [w + 1, A], read the former.
    """

    tokens: Tensor
    near: Tensor
    far: Tensor
    is_near: Tensor


class HaloPlan(NamedTuple):
    """Rows of one layout on one rank.

    Attributes:
        override: None where no token's reads are replaced.
        final: int64 [N * w], indices of needed rows that are final states, its length for zeros; None unless wanted.
    """

    width: int
    num_rows: int
    route: Route
    override: BoundaryOverride | None
    final: Tensor | None


@lru_cache(maxsize=32)
def plan(layout: HaloLayout, rank: int, device: torch.device) -> HaloPlan:
    """The plan, computed once for all layers of a model."""
    with torch.inference_mode(False):  # a plan made while generating may serve training, which saves its indices
        rows = Rows(layout, rank)
        final = _position(rows, final_rows(layout).flatten()).to(device) if layout.final else None
        return HaloPlan(layout.width, len(rows.needed.rows), _route(rows, device), _override(rows, device), final)


@lru_cache(maxsize=32)
def tail_plan(layout: HaloLayout, rank: int, device: torch.device) -> HaloPlan:
    """The plan where no states are: of the tokens here, the others then read some of the last w, as whose it counts
    them."""
    scheme = plan(layout, rank, device)
    first = max(0, layout.starts[rank + 1] - layout.starts[rank] - layout.width)
    with torch.inference_mode(False):
        sends = tuple((other, tokens - first) for other, tokens in scheme.route.sends)
    return scheme._replace(route=scheme.route._replace(sends=sends))


def _position(rows: Rows, wanted: Tensor) -> Tensor:
    """Positions of the rows in the needed rows; its length for NONE."""
    found = torch.searchsorted(rows.needed.rows, wanted)
    return torch.where(wanted == NONE, len(rows.needed.rows), found)


def _route(rows: Rows, device: torch.device) -> Route:
    wanted, total = rows.needed.rows, rows.total
    owner, is_token = rows.owner(wanted), wanted < total
    receives, sends, state_of = [], [], []
    for rank, other in enumerate(rows.needs):
        if rank == rows.rank:
            continue
        positions = ((owner == rank) & is_token).nonzero()[:, 0]
        if len(positions):
            receives.append((rank, positions.to(device)))
        mine = other.rows[(rows.owner(other.rows) == rows.rank) & (other.rows < total)]
        if len(mine):
            sends.append((rank, (mine - rows.start).to(device)))
        used = other.rows[other.rows >= total] - total
        if rows.rank == 0 and len(used):
            state_of.append((rank, used.to(device)))
    here = ((owner == rows.rank) & is_token).nonzero()[:, 0]
    state = (~is_token).nonzero()[:, 0]
    end = int(torch.searchsorted(wanted, rows.start))
    return Route(
        (here.to(device), (wanted[here] - rows.start).to(device)),
        (state.to(device), (wanted[state] - total).to(device)),
        tuple(receives),
        tuple(sends),
        tuple(state_of),
        slice(end - rows.needed.halo, end),
    )


def _override(rows: Rows, device: torch.device) -> BoundaryOverride | None:
    tokens, documents = rows.exceptions()
    if not len(tokens):
        return None
    # A row for each token back, from none to w.
    wanted = before(rows.layout, tokens - torch.arange(rows.layout.width + 1)[:, None], documents)
    is_near = (wanted >= rows.start) & (wanted < rows.end)
    near = torch.where(is_near, wanted - rows.start, 0)
    far = torch.where(is_near, len(rows.needed.rows), _position(rows, wanted))
    return BoundaryOverride((tokens - rows.start).to(device), near.to(device), far.to(device), is_near.to(device))
