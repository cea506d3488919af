"""Which tokens step s trains on: a pure function of (seed, s, global_batch, T), whatever the ranks.

A sequence is a slice of T consecutive tokens of the stream; its labels are the T tokens one place on. Labels are
taken from the stream *before* sharding, so the last token of a shard is trained to predict the first token of the
next shard. Sequence b of step s is number s * global_batch + b of an endless list: all sequences in a shuffled
order, then all of them in another one, and so on. Nothing is remembered between steps, so to resume is to ask for
the next step.

Packed, the rows of a batch are one sequence after another, cut where documents start and where rows do: nothing crosses
a cut, neither state nor label. A document that starts before its row begins anew there.

Consecutive, row b of a step goes on where row b of the step before ended: the stream is cut into as many parts as the
global batch has rows, and each row reads its part in order, again and again. So a model may carry its state along.

Letters: B rows, T tokens of a whole sequence, N tokens in the stream.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lasp.data.errors import DataError
from lasp.data.stream import Bounds, Tokens

_MASK = (1 << 64) - 1


class Batch(NamedTuple):
    """What one rank sees of a batch."""

    tokens: np.ndarray
    """[rows, T / sp] int64; packed [1, rows T / sp], consecutive tokens of all rows one after another."""
    labels: np.ndarray
    """Of the same shape, int64, the tokens one place on; -100 where there is nothing to predict."""
    cu_seqlens: tuple[int, ...] | None = None
    """Packed: where documents start in the rows [rows T] of all ranks of the sequence, and their end."""


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
    """How many whole sequences of `seq_len` tokens the stream holds, each with a label for its last token."""
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
    ) -> None:
        """
        Args:
            stream: token ids [N].
            bounds: int64 [documents + 1], where documents start and the last one ends, for packed batches; None
                makes rows of whatever tokens follow one another.
            consecutive: every row goes on where it was in the step before, and nothing is shuffled.

        Raises:
            DataError: the stream holds no whole sequence.
        """
        self.stream, self.seq_len, self.seed, self.bounds = stream, seq_len, seed, bounds
        self.consecutive = consecutive
        self.count = num_sequences(stream, seq_len)
        if self.count == 0:
            raise DataError(
                f"the text has {len(stream):,} tokens, too few for one sequence of {seq_len:,}: "
                "add text or lower --seq-len"
            )

    def batch(self, step: int, global_batch: int, shard: Shard, *, part: int = 0, num_parts: int = 1) -> Batch:
        """This rank's share of part `part` (of num_parts: gradient accumulation) of the batch of `step`."""
        rows_per_part = global_batch // num_parts
        rows = [part * rows_per_part + row for row in shard.rows(rows_per_part)]
        numbers = [self.number(step, row, global_batch) for row in rows]
        if self.bounds is None:
            return read(self.stream, numbers, self.seq_len, shard)
        return read_packed(self.stream, self.bounds, numbers, self.seq_len, shard)

    def num_targets(self, step: int, global_batch: int) -> int:
        """Labels to predict in the whole batch of `step`, over all ranks and parts: all tokens, or packed those that
        another of their document follows."""
        if self.bounds is None:
            return global_batch * self.seq_len
        numbers = (self.number(step, row, global_batch) for row in range(global_batch))
        return sum(self.seq_len - len(_ends(self.bounds, number * self.seq_len, self.seq_len)) for number in numbers)

    def number(self, step: int, row: int, global_batch: int) -> int:
        """Which sequence of the stream is row `row` of the batch of `step`."""
        if not self.consecutive:
            return self.shuffled(step * global_batch + row)
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


def validation_batch(stream: Tokens, first: int, num_rows: int, end: int, seq_len: int, shard: Shard) -> Batch:
    """This rank's share of sequences first .. first + num_rows, in the stream's own order.

    Rows at or past `end` are there to make the shapes equal on all ranks; their labels are -100.
    """
    rows = [first + row for row in shard.rows(num_rows)]
    batch = read(stream, [row if row < end else 0 for row in rows], seq_len, shard)
    batch.labels[[row >= end for row in rows]] = -100
    return batch


def read(stream: Tokens, numbers: list[int], seq_len: int, shard: Shard) -> Batch:
    """The shard's tokens and labels of the given sequences; reads nothing else from the file."""
    run = shard.tokens(seq_len)
    pieces = [stream[number * seq_len + run.start : number * seq_len + run.stop + 1] for number in numbers]
    window = np.stack(pieces).astype(np.int64)
    return Batch(window[:, :-1].copy(), window[:, 1:].copy())


def read_packed(stream: Tokens, bounds: Bounds, numbers: list[int], seq_len: int, shard: Shard) -> Batch:
    """The shard's tokens and labels of the given sequences, one after another; reads nothing else from the file."""
    run = shard.tokens(len(numbers) * seq_len)
    cuts = [0]
    tokens, labels = [], []
    for row, number in enumerate(numbers):
        start, before = number * seq_len, row * seq_len
        ends = _ends(bounds, start, seq_len) - start
        cuts += [before + int(end) for end in ends if end < seq_len]
        cuts.append(before + seq_len)
        first, last = max(run.start - before, 0), min(run.stop - before, seq_len)
        if first >= last:
            continue
        window = stream[start + first : start + last + 1].astype(np.int64)
        following = window[1:].copy()
        here = ends[(ends > first) & (ends <= last)]
        following[here - 1 - first] = -100
        tokens.append(window[:-1])
        labels.append(following)
    return Batch(np.concatenate(tokens)[None], np.concatenate(labels)[None], tuple(cuts))


def _ends(bounds: Bounds, start: int, seq_len: int) -> np.ndarray:
    """The ends of documents, among `bounds`, that lie in a sequence: in start + 1 .. start + seq_len."""
    low, high = bisect_right(bounds, start), bisect_right(bounds, start + seq_len)
    return np.asarray(bounds[low:high])


def permute(place: int, size: int, seed: int) -> int:
    """Where a shuffle of range(size), chosen by `seed`, puts `place`.

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
