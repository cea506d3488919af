"""Chooses the tokens that step s trains on: a pure function of (seed, s, global_batch, T), whatever the ranks.

A sequence is a slice of T consecutive tokens of the stream; its labels are the T tokens one place on. Labels are
taken from the stream *before* sharding, so the last token of a shard is trained to predict the first token of the
next shard. Sequence b of step s is number s * global_batch + b of an endless list: all sequences in a shuffled
order, then all of them in another one, and so on. Nothing is remembered between steps, so to resume is to ask for
the next step; where batches have another size from some step on, they go on in that list from where it was then.

Packed, the rows of a batch are one sequence after another, cut where documents start and where rows do: no state
crosses a cut. A document starts at the separator before it, from which its first token is predicted: so the labels are
those of any other batch, and a separator's is the only one that no text of its own came before. A document that starts
before its row begins anew there.

Consecutive, row b of a step goes on where row b of the step before ended: the stream is cut into as many parts as the
global batch has rows, and each row reads its part in order, again and again. So a model may carry its state along.

Letters: B rows, T tokens of a whole sequence, N tokens in the stream.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lasp.data.arguments import check, check_whole
from lasp.data.stream import Bounds, Tokens
from lasp.errors import DataError

_MASK = (1 << 64) - 1


class Batch(NamedTuple):
    """One rank's part of a batch."""

    tokens: np.ndarray
    """[rows, T / sp] int64; packed [1, rows T / sp], consecutive tokens of all rows one after another."""
    labels: np.ndarray
    """Of the same shape, int64, the tokens one place on; -100 where there is nothing to predict."""
    cu_seqlens: tuple[int, ...] | None = None
    """Packed: where documents start (at the separator before) in the rows [rows T] of all ranks of the sequence, and
    their end."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of every batch that one rank holds: some rows, and of each the same run of tokens."""

    dp_rank: int = 0
    dp_size: int = 1
    sp_rank: int = 0
    sp_size: int = 1

    def rows(self, num_rows: int) -> range:
        """This rank's rows of a batch of `num_rows` (a multiple of dp_size)."""
        per_rank = num_rows // self.dp_size
        return range(self.dp_rank * per_rank, (self.dp_rank + 1) * per_rank)

    def tokens(self, seq_len: int) -> range:
        """This rank's tokens of a sequence of `seq_len` (a multiple of sp_size)."""
        per_rank = seq_len // self.sp_size
        return range(self.sp_rank * per_rank, (self.sp_rank + 1) * per_rank)


def num_sequences(stream: Tokens, seq_len: int) -> int:
    """Number of whole sequences of `seq_len` tokens the stream holds, each with a label for its last token."""
    return max(0, (len(stream) - 1) // seq_len)


class Sequences:
    """The sequences of a token stream in their training order."""

    def __init__(
        self,
        stream: Tokens,
        *,
        seq_len: int,
        seed: int,
        bounds: Bounds | None = None,
        consecutive: bool = False,
        origin: tuple[int, int] = (0, 0),
    ) -> None:
        """
        Args:
            stream: token ids [N].
            bounds: int64 [documents + 1], where documents start and the last one ends, for packed batches; None
                makes rows of whatever tokens follow one another.
            consecutive: every row goes on where it was in the step before, and nothing is shuffled.
            origin: a step and the place in the endless list of its first sequence; not of consecutive ones.

        Raises:
            DataError: an argument is of another kind, or the stream holds no whole sequence.
        """
        check("stream", stream, hasattr(stream, "__len__") and hasattr(stream, "__getitem__"), "numbers in order")
        check_whole("seq_len", seq_len, 1)
        check_whole("seed", seed, None)
        check("consecutive", consecutive, isinstance(consecutive, bool), "True or False")
        self.stream, self.seq_len, self.seed, self.bounds = stream, seq_len, seed, bounds
        self.consecutive, self.origin = consecutive, origin
        self.count = num_sequences(stream, seq_len)
        if self.count == 0:
            raise DataError(
                f"the text has {len(stream):,} tokens, too few for one sequence of {seq_len:,}: "
                "add text or lower --seq-len"
            )

    def batch(self, step: int, global_batch: int, shard: Shard, *, part: int = 0, num_parts: int = 1) -> Batch:
        """This rank's share of part `part` (of num_parts: gradient accumulation) of the batch of `step`."""
        numbers = self.numbers(step, global_batch, shard, part=part, num_parts=num_parts)
        if self.bounds is None:
            return read(self.stream, numbers, self.seq_len, shard)
        return read_packed(self.stream, self.bounds, numbers, self.seq_len, shard)

    def numbers(self, step: int, global_batch: int, shard: Shard, *, part: int = 0, num_parts: int = 1) -> list[int]:
        """Numbers of the sequences of the stream that `batch` reads: the same for all ranks that share them."""
        rows_per_part = global_batch // num_parts
        rows = [part * rows_per_part + row for row in shard.rows(rows_per_part)]
        return [self.number(step, row, global_batch) for row in rows]

    def num_targets(self, global_batch: int) -> int:
        """Labels to predict in the batch of a step, over all ranks and parts: every token has one."""
        return global_batch * self.seq_len

    def number(self, step: int, row: int, global_batch: int) -> int:
        """Number of the sequence of the stream that is row `row` of the batch of `step`."""
        if not self.consecutive:
            origin, first = self.origin
            return self.shuffled(first + (step - origin) * global_batch + row)
        length = self._part_length(global_batch)
        return row * length + step % length

    def steps_carried(self, step: int, global_batch: int) -> int:
        """Consecutive: how many steps before `step` its rows go on from; 0 where they start anew."""
        return step % self._part_length(global_batch)

    def _part_length(self, global_batch: int) -> int:
        length = self.count // global_batch
        if length == 0:
            raise DataError(
                f"the text has {self.count:,} sequences of {self.seq_len:,} tokens, too few for {global_batch} rows "
                "that each go on where they were (--data.carry): add text or lower --seq-len or --global-batch"
            )
        return length

    def shuffled(self, number: int) -> int:
        """The sequence at place `number` of the endless list."""
        epoch, place = divmod(number, self.count)
        return permute(place, self.count, self.seed * 0x9E3779B97F4A7C15 + epoch)


def validation_batch(
    stream: Tokens,
    first: int,
    num_rows: int,
    end: int,
    seq_len: int,
    shard: Shard,
    bounds: Bounds | None = None,
) -> Batch:
    """This rank's share of sequences first .. first + num_rows, in the stream's own order; with `bounds` packed.

    Rows at or past `end` are there to make the shapes equal on all ranks, and the stream may end within a row: labels
    where there is nothing to score are -100.
    """
    numbers = [first + row if first + row < end else None for row in shard.rows(num_rows)]
    return (
        read(stream, numbers, seq_len, shard)
        if bounds is None
        else read_packed(stream, bounds, numbers, seq_len, shard)
    )


def read(stream: Tokens, numbers: Sequence[int | None], seq_len: int, shard: Shard) -> Batch:
    """The shard's tokens and labels of the given sequences (None: an empty row); reads nothing else from the file."""
    run = shard.tokens(seq_len)
    tokens, labels = zip(*(_window(stream, number, run, seq_len) for number in numbers), strict=True)
    return Batch(np.stack(tokens), np.stack(labels))


def read_packed(stream: Tokens, bounds: Bounds, numbers: Sequence[int | None], seq_len: int, shard: Shard) -> Batch:
    """Read one sequence after another, cut where documents start; `bounds` as `Sequences` takes them."""
    run = shard.tokens(len(numbers) * seq_len)
    cuts, rows = [0], []
    for row, number in enumerate(numbers):
        before = row * seq_len
        if number is not None:
            cuts += [before + cut for cut in _starts(bounds, number * seq_len, seq_len)]
        cuts.append(before + seq_len)
        here = range(max(run.start - before, 0), min(run.stop - before, seq_len))
        if here:
            rows.append(_window(stream, number, here, seq_len))
    tokens, labels = (np.concatenate(part)[None] for part in zip(*rows, strict=True))
    return Batch(tokens, labels, tuple(cuts))


def _window(stream: Tokens, number: int | None, run: range, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `run` of a sequence and their labels, both int64 [len(run)]; where the stream has ended 0 and -100."""
    tokens, labels = np.zeros(len(run), np.int64), np.full(len(run), -100, np.int64)
    if number is not None:
        start = number * seq_len + run.start
        read = stream[start : start + len(run) + 1].astype(np.int64)
        tokens[: len(read)] = read[: len(run)]
        labels[: max(len(read) - 1, 0)] = read[1:]
    return tokens, labels


def _starts(bounds: Bounds, start: int, seq_len: int) -> list[int]:
    """Places in a sequence, from 1, where documents start: separators, each the last token of the document before."""
    low, high = bisect_left(bounds, start + 2), bisect_left(bounds, start + seq_len + 1)
    return [int(bound) - 1 - start for bound in bounds[low:high]]


def permute(place: int, size: int, seed: int) -> int:
    """The place to which a shuffle of range(size), chosen by `seed`, moves `place`.

    A four-round Feistel network on the smallest even number of bits that holds `size`, repeated until the result
    is in range. It needs no list of all numbers, and unlike a library's shuffle it never changes with a version.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix(right + (round_number << 32) + seed * 4) & mask)
        place = left << half | right
        if place < size:
            return place


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
