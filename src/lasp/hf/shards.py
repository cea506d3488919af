"""A rank's part of a batch: its tokens, their positions and targets, and a record of how the batch is split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.models.loss import IGNORED_LABEL
from lasp.sequence import SequenceParallel, balanced_lengths
from lasp.sequence.arguments import check_tensor, wholes

# Of a collator for flash attention and Mamba's kernels: documents once more, which position_ids say.
_DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# Of a processor for images and text: what kind of token each is, 0 for text.
_KINDS = ("token_type_ids", "mm_token_type_ids")
_TOKENS = ("input_ids", "attention_mask", "position_ids", "labels", "shift_labels")


# Compared by identity: a compiler that was given one would otherwise look into it, and compile anew in every step.
@dataclass(frozen=True, eq=False)
class BatchShard:
    """Says how a batch is split, and which part is here. It can be pickled.

    Attributes:
        lengths: tokens of every rank, of each of the batch's sequences.
        rank: whose part this is.
        cu_seqlens: where packed documents start in the whole sequence, and its length; None without packing.
        targets: how many of the whole batch's tokens have a label; None without labels.
        digest: of the whole batch, which all ranks must have been given.
    """

    lengths: tuple[int, ...]
    rank: int
    cu_seqlens: tuple[int, ...] | None
    targets: int | None
    digest: str


def shard(
    batch: Mapping[str, Any],
    sp: SequenceParallel | None,
    lengths: Sequence[int] | None = None,
    *,
    one_row: bool = False,
) -> dict[str, Any]:
    """This rank's part of a batch, to call a parallelized model with: `model(**shard(batch, sp))`.

    Rows that are padded, or packed with documents whose positions start anew, become one sequence of documents,
    [1, tokens]; padding is dropped.

    Args:
        batch: the whole, the same on every rank: input_ids [B, T] and, where there are, attention_mask [B, T] (1 for
            tokens, 0 for padding), position_ids [B, T] or [1, T] (a document starts where they do not rise by one),
            labels [B, T] (each token's own, as transformers takes them) or shift_labels [B, T] (the next token's), with
            -100 for none.
        sp: the ranks that share the sequences; None for one process.
        lengths: tokens for every rank, at least one each; those of `sp` by default, else as equal as can be.
        one_row: also of rows that have no padding and one document each make one sequence.

    Returns:
        input_ids, position_ids, labels and shift_labels [B, T here], and lasp_shard, a `BatchShard`.

    Raises:
        ValueError: something in the batch is not known here, has another shape, or cannot be split.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError("batch must be a mapping with input_ids [B, T], and labels [B, T] to train")
    if sp is not None and not isinstance(sp, SequenceParallel):
        raise ValueError(f"sp must be a SequenceParallel or None, got {type(sp).__name__}")
    given = {name: value for name, value in batch.items() if value is not None and not _is_text(name, value)}
    _check(given)
    rows = _laid_out(given)
    digest = _digest(rows)
    bounds, rows = _flattened(rows, one_row)
    total = rows["input_ids"].shape[1]
    cut = _lengths(total, sp, lengths)
    rank = 0 if sp is None else sp.rank
    targets = int((rows["shift_labels"] != IGNORED_LABEL).sum()) if "shift_labels" in rows else None
    start = sum(cut[:rank])
    part: dict[str, Any] = {name: value[:, start : start + cut[rank]].contiguous() for name, value in rows.items()}
    # transformers asks whether there are labels; which, shift_labels says.
    if "shift_labels" in part:
        part.setdefault("labels", part["shift_labels"])
    return {**part, "lasp_shard": BatchShard(cut, rank, bounds, targets, digest)}


def _is_text(name: str, value: Any) -> bool:
    return name in _KINDS and isinstance(value, Tensor) and not bool(value.any())


def _check(given: Mapping[str, Any]) -> None:
    unknown = sorted(set(given) - {*_TOKENS, *_DOCUMENTS})
    if unknown:
        raise ValueError(
            f"batch has {', '.join(unknown)}, of which it is not known how to split it: sequences of text have "
            f"{', '.join(_TOKENS)}"
        )
    ids = given["input_ids"]
    check_tensor("input_ids", ids, "[B, T]")
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or 0 in ids.shape:
        raise ValueError(f"input_ids must be integers [B, T] with tokens, got {ids.dtype} {list(ids.shape)}")
    for name in ("attention_mask", "position_ids", "labels", "shift_labels"):
        if name in given:
            check_tensor(name, given[name], "[B, T]")
            allowed = [tuple(ids.shape)] + [(1, ids.shape[1])] * (name == "position_ids")
            if tuple(given[name].shape) not in allowed:
                raise ValueError(
                    f"{name} must have the shape of input_ids, {list(ids.shape)}, got {list(given[name].shape)}"
                )
    if "position_ids" not in given and any(name in given for name in _DOCUMENTS):
        named = ", ".join(name for name in _DOCUMENTS if name in given)
        raise ValueError(f"batch has {named} without position_ids: give the positions of tokens in their documents")


def _laid_out(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Ids, positions and targets of all rows [B, T], and labels and the mask where there are."""
    ids = given["input_ids"]
    rows, mask = {"input_ids": ids}, given.get("attention_mask")
    if mask is not None and not bool((mask != 0).all()):
        rows["attention_mask"] = mask != 0
    counted = torch.arange(ids.shape[1], device=ids.device)
    if "attention_mask" in rows:
        counted = rows["attention_mask"].cumsum(1) - 1
    rows["position_ids"] = given.get("position_ids", counted).expand(ids.shape).to(torch.int64)
    for name in ("labels", "shift_labels"):
        if name in given:
            rows[name] = given[name].to(torch.int64)
    if "labels" in rows and "shift_labels" not in rows:
        rows["shift_labels"] = F.pad(rows["labels"], (0, 1), value=IGNORED_LABEL)[:, 1:]
    return rows


def _flattened(rows: dict[str, Tensor], one_row: bool) -> tuple[tuple[int, ...] | None, dict[str, Tensor]]:
    """Bounds of documents and the rows one after another; None and the rows, where each is one document, by default."""
    positions, mask = rows["position_ids"], rows.pop("attention_mask", None)
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=1) != 1
    if mask is None:
        if int(starts.sum()) == len(starts) and not (one_row and len(starts) > 1):
            return None, rows
        mask = torch.ones_like(starts)
    before = F.pad(mask, (1, 0))[:, :-1]
    first = mask & ~before
    if bool((first.sum(1) != 1).any()):
        raise ValueError("attention_mask must mark the tokens of each row, at least one, without padding between them")
    _check_padding(rows, mask, first)
    # A row's first token starts a document, whatever its position.
    begins = torch.nonzero((starts | first)[mask])[:, 0].tolist()
    flat = {name: value[mask][None] for name, value in rows.items()}
    return None if len(begins) == 1 else (*begins, flat["input_ids"].shape[1]), flat


def _check_padding(rows: Mapping[str, Tensor], mask: Tensor, first: Tensor) -> None:
    """Padding has no targets; but for the one before a row's first token, which predicts nothing that has a past."""
    for name, without in (("labels", ~mask), ("shift_labels", ~mask & ~F.pad(first, (0, 1))[:, 1:])):
        if name in rows and bool((rows[name][without] != IGNORED_LABEL).any()):
            raise ValueError(f"{name} of padding must be {IGNORED_LABEL}")


def _lengths(total: int, sp: SequenceParallel | None, lengths: Sequence[int] | None) -> tuple[int, ...]:
    size = 1 if sp is None else sp.size
    if lengths is None:
        lengths = sp.lengths if sp is not None and sp.lengths is not None else balanced_lengths(total, size)
    cut = wholes("lengths", lengths)
    if len(cut) != size or sum(cut) != total or min(cut) < 1:
        raise ValueError(
            f"lengths must hold at least one token for each of the {size} ranks and sum to the {total} tokens of the "
            f"sequence, got {cut}"
        )
    return cut


def _digest(rows: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for name, value in rows.items():
        found.update(f"{name} {tuple(value.shape)}".encode())
        found.update(value.detach().to("cpu", torch.int64).contiguous().numpy().data)
    return found.hexdigest()
