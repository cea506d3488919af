"""Tests which tokens a rank sees: whatever the layout, together the same batch; and labels cross shard borders."""

from typing import Any

import numpy as np
import pytest

from lasp.data.batches import Batch, Sequences, Shard, permute, read, validation_batch
from lasp.errors import DataError

STREAM = np.arange(1000, dtype=np.uint16)


def assembled(sequences: Sequences, step: int, dp: int, sp: int, parts: int) -> dict[int, Batch]:
    """Row by first token -> the whole row, put together from every rank's share."""
    rows: dict[Any, Any] = {}
    for part in range(parts):
        for dp_rank in range(dp):
            shares = [
                sequences.batch(
                    step,
                    8,
                    Shard(dp_rank=dp_rank, dp_size=dp, sp_rank=rank, sp_size=sp),
                    part=part,
                    num_parts=parts,
                )
                for rank in range(sp)
            ]
            tokens = np.concatenate([share.tokens for share in shares], axis=1)
            labels = np.concatenate([share.labels for share in shares], axis=1)
            rows |= {int(t[0]): Batch(t, label) for t, label in zip(tokens, labels, strict=True)}
    return rows


@pytest.mark.parametrize(("dp", "sp", "parts"), [(1, 4, 1), (2, 2, 1), (4, 1, 2), (2, 3, 2)])
def test_every_layout_sees_the_same_batch(dp: int, sp: int, parts: int) -> None:
    sequences = Sequences(STREAM, seq_len=24, seed=5)
    for step in (0, 7):
        expected = assembled(sequences, step, 1, 1, 1)
        found = assembled(sequences, step, dp, sp, parts)
        assert len(expected) == 8 and found.keys() == expected.keys()
        for key, row in expected.items():
            np.testing.assert_array_equal(found[key].tokens, row.tokens)
            np.testing.assert_array_equal(found[key].labels, row.labels)


def test_the_last_token_of_a_shard_predicts_the_first_of_the_next() -> None:
    first, second = (read(STREAM, [3], 24, Shard(sp_rank=rank, sp_size=2)) for rank in range(2))
    assert first.tokens[0, 0] == 72 and first.tokens.shape == (1, 12)
    assert first.labels[0, -1] == second.tokens[0, 0] == 84
    assert second.labels[0, -1] == 96  # and the sequence's last token predicts the next sequence's first


def test_an_epoch_holds_every_sequence_once_and_epochs_differ() -> None:
    sequences = Sequences(STREAM, seq_len=9, seed=1)
    count = sequences.count
    epochs = [[sequences.shuffled(epoch * count + i) for i in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(count))
    other_seed = Sequences(STREAM, seq_len=9, seed=2)
    assert [other_seed.shuffled(i) for i in range(count)] != epochs[0]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_permute_is_a_permutation(size: int) -> None:
    for seed in range(3):
        assert sorted(permute(i, size, seed) for i in range(size)) == list(range(size))


def test_the_order_never_changes_between_versions() -> None:
    assert [permute(i, 100, 7) for i in range(6)] == [52, 60, 22, 42, 55, 8]


def test_validation_rows_past_the_end_have_no_labels() -> None:
    batch = validation_batch(STREAM, 4, 4, 6, 10, Shard())
    assert batch.tokens[:2, 0].tolist() == [40, 50]
    assert (batch.labels[:2] != -100).all() and (batch.labels[2:] == -100).all()


def test_too_little_text_says_so() -> None:
    with pytest.raises(DataError, match="too few for one sequence of 1,000"):
        Sequences(STREAM, seq_len=1000, seed=0)
