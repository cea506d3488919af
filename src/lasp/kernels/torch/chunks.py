"""Cutting a run into chunks, the scan over them, and joining them again. No chunk holds tokens of two documents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.algebra import Summary, scan
from lasp.recurrence.documents import Documents


class Chunking:
    """A run of tokens as N chunks of C tokens each; the last of the run, or of each document, is padded with zeros.

    Args:
        tokens: T of the run.
        size: C.
        documents: the packed documents, or None for a batch of sequences.
    """

    def __init__(self, tokens: int, size: int, documents: Documents | None) -> None:
        self.size = size
        self._tokens, self._documents = tokens, documents
        # Chunks of each document: [first, end).
        self._spans: list[tuple[int, int]] = []
        # For each slot of the chunks the token it holds (`tokens` for padding), and for each token its slot.
        self._token_of_slot: Tensor | None = None
        self._slot_of_token: Tensor | None = None
        if documents is not None:
            self._lay_out(documents)

    @property
    def is_padded(self) -> bool:
        """Whether some chunk has fewer tokens than C."""
        return self._documents is not None or self._tokens % self.size > 0

    def cut(self, tensor: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, H, N, C, D]."""
        if self._token_of_slot is None:
            tensor = pad(tensor, (0, 0, 0, 0, 0, -self._tokens % self.size))
        else:
            tensor = pad(tensor, (0, 0, 0, 0, 0, 1))[:, self._token_of_slot.to(tensor.device)]
        batch, slots, heads, dim = tensor.shape
        return tensor.view(batch, slots // self.size, self.size, heads, dim).permute(0, 3, 1, 2, 4).contiguous()

    def join(self, tensor: Tensor) -> Tensor:
        """[B, H, N, C, D] -> [B, T, H, D]: the inverse of `cut`."""
        tensor = tensor.permute(0, 2, 3, 1, 4).flatten(1, 2)
        if self._slot_of_token is None:
            return tensor[:, : self._tokens]
        return tensor[:, self._slot_of_token.to(tensor.device)]

    def scan(self, chunks: Summary, initial: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """The scan over the chunks, of each sequence or document for itself.

        Args:
            chunks: summaries with the chunks on a leading axis, [N, B, H, K, V].
            initial: [B or documents, H, K, V].

        Returns:
            The state that enters each chunk, [B, H, N, K, V], and the states at the end, as `initial`.
        """
        if self._documents is None:
            entering, end = scan(chunks, initial, reverse=reverse)
            return entering.movedim(0, 2), end
        entering, ends = torch.empty_like(chunks.state), [initial[:0]]
        for document, (first, last) in enumerate(self._spans):
            part, end = scan(chunks[first:last], initial[document : document + 1], reverse=reverse)
            entering[first:last] = part
            ends.append(end)
        return entering.movedim(0, 2), torch.cat(ends)

    def spread(self, states: Tensor) -> Tensor:
        """[B or documents, H, ...], one for each sequence or document, -> [B, H, N or 1, ...], for each chunk."""
        if self._documents is None:
            return states.unsqueeze(2)
        index = [document for document, (first, last) in enumerate(self._spans) for _ in range(first, last)]
        return states[index].movedim(0, 1)[None]

    def _lay_out(self, documents: Documents) -> None:
        size, slots, first = self.size, [], 0
        for start, end in documents.spans:
            count = -(-(end - start) // size)
            slots.append(first * size + torch.arange(end - start))
            self._spans.append((first, first + count))
            first += count
        slot_of_token = torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64)
        token_of_slot = torch.full((first * size,), self._tokens)
        token_of_slot[slot_of_token] = torch.arange(self._tokens)
        self._slot_of_token, self._token_of_slot = slot_of_token, token_of_slot


def chunk_size(limit: int, tokens: int, documents: Documents | None) -> int:
    """C, a power of two: at most `limit`, and no longer than most documents need."""
    longest = tokens if documents is None or not documents.ids else -(-tokens // len(documents.ids))
    return min(limit, 1 << max(0, longest - 1).bit_length())
