"""Cutting a run into chunks, the scan over them, and joining them again. No chunk holds tokens of two documents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.algebra import Identity, Summary, scan
from lasp.recurrence.documents import Documents
from lasp.recurrence.untraced import cached


class Chunking:
    """A run of tokens as N chunks of C tokens each; the last of the run, or of each document, is padded with zeros.

    Args:
        tokens: T of the run.
        size: C.
        documents: the packed documents, or None for a batch of sequences.
    """

    def __init__(self, tokens: int, size: int, documents: Documents | None) -> None:
        self.size = size
        self._tokens = tokens
        self._layout = None if documents is None else _layout(documents, size)

    @property
    def is_padded(self) -> bool:
        """True if some chunk has fewer tokens than C."""
        return self._layout is not None or self._tokens % self.size > 0

    def cut(self, tensor: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, H, N, C, D]."""
        if self._layout is None:
            tensor = pad(tensor, (0, 0, 0, 0, 0, -self._tokens % self.size))
        else:
            tensor = pad(tensor, (0, 0, 0, 0, 0, 1))[:, self._layout.token_of_slot.to(tensor.device)]
        batch, slots, heads, dim = tensor.shape
        return tensor.reshape(batch, slots // self.size, self.size, heads, dim).permute(0, 3, 1, 2, 4).contiguous()

    def join(self, tensor: Tensor) -> Tensor:
        """[B, H, N, C, D] -> [B, T, H, D]: the inverse of `cut`."""
        tensor = tensor.permute(0, 2, 3, 1, 4).flatten(1, 2)
        if self._layout is None:
            return tensor[:, : self._tokens]
        return tensor[:, self._layout.slot_of_token.to(tensor.device)]

    def scan(self, chunks: Summary, initial: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """The scan over the chunks, of each sequence or document for itself.

        Where anything decays the state is carried in fp64, between thousands of chunks: their transitions are to give
        it in fp64 too, since a slow decay rounded to fp32 is off by up to 2^-25, every time in the same direction.

        Args:
            chunks: summaries with the chunks on a leading axis, [N, B, H, K, V].
            initial: [B or documents, H, K, V].

        Returns:
            The state that enters each chunk, [B, H, N, K, V], and the states at the end, as `initial`.
        """
        start = initial if isinstance(chunks.transition, Identity) else initial.double()
        if self._layout is None:
            entering, end = scan(chunks, start, reverse=reverse)
            return entering.movedim(0, 2), end.to(initial.dtype)
        entering, ends = torch.empty_like(chunks.state), [start[:0]]
        for document, (first, last) in enumerate(self._layout.spans):
            part, end = scan(chunks[first:last], start[document : document + 1], reverse=reverse)
            entering[first:last] = part
            ends.append(end)
        return entering.movedim(0, 2), torch.cat(ends).to(initial.dtype)

    def spread(self, states: Tensor) -> Tensor:
        """[B or documents, H, ...], one for each sequence or document, -> [B, H, N or 1, ...], for each chunk."""
        if self._layout is None:
            return states.unsqueeze(2)
        index = [document for document, (first, last) in enumerate(self._layout.spans) for _ in range(first, last)]
        return states[index].movedim(0, 1)[None]


class _Layout(NamedTuple):
    """Chunks of packed documents.

    Attributes:
        spans: of each document its chunks, [first, end).
        token_of_slot: for each slot of the chunks the token it holds, T for padding. slot_of_token: the inverse.
    """

    spans: list[tuple[int, int]]
    token_of_slot: Tensor
    slot_of_token: Tensor


@cached(maxsize=8)
def _layout(documents: Documents, size: int) -> _Layout:
    """Every stage of every layer of a step asks the same, hence the cache; not larger, for its tensors are of T."""
    tokens, spans, slots, first = documents.bounds[-1], [], [], 0
    with torch.inference_mode(False):  # what generating laid out may serve training
        for start, end in documents.spans:
            count = -(-(end - start) // size)
            slots.append(first * size + torch.arange(end - start))
            spans.append((first, first + count))
            first += count
        slot_of_token = torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64)
        token_of_slot = torch.full((first * size,), tokens)
        token_of_slot[slot_of_token] = torch.arange(tokens)
    return _Layout(spans, token_of_slot, slot_of_token)


def chunk_size(limit: int, tokens: int, documents: Documents | None) -> int:
    """C, a power of two: at most `limit`, and no longer than most documents need."""
    longest = tokens if documents is None or not documents.ids else -(-tokens // len(documents.ids))
    return min(limit, 1 << max(0, longest - 1).bit_length())
