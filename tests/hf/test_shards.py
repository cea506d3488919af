"""Tests what a rank gets of a batch: positions, targets and documents are those of the whole."""

from __future__ import annotations

import pickle
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
import world

import lasp
import lasp.hf

IDS = torch.arange(1, 13).view(2, 6)


def rows(*values: Any) -> torch.Tensor:
    return torch.tensor(values)


def test_a_dense_batch_over_ranks() -> None:
    def work(rank: int) -> tuple[Any, ...]:
        sp = lasp.SequenceParallel(dist.group.WORLD)
        found = lasp.hf.shard({"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones(2, 6)}, sp, (1, 2, 3))
        names = "input_ids", "position_ids", "labels", "shift_labels"
        record = pickle.loads(pickle.dumps(found["lasp_shard"]))
        return (*(found[name].tolist() for name in names), record.lengths, record.rank, record.targets, record.digest)

    parts = world.run(3, work)
    together = [[list(chain(*rows)) for rows in zip(*(part[name] for part in parts), strict=True)] for name in range(4)]
    # Each token's target is the next one's label: a shard's last predicts the next shard's first.
    targets = [[*range(2, 7), -100], [*range(8, 13), -100]]
    assert together == [IDS.tolist(), [list(range(6))] * 2, IDS.tolist(), targets]
    assert [part[4:7] for part in parts] == [((1, 2, 3), rank, 10) for rank in range(3)]
    assert len({part[7] for part in parts}) == 1


@pytest.mark.parametrize(
    ("batch", "ids", "positions", "targets", "documents"),
    [
        (  # packed in one row, as collators do it
            {"input_ids": rows([1, 2, 3, 4]), "labels": rows([-100, 2, -100, 4]), "position_ids": rows([0, 1, 0, 1])},
            [1, 2, 3, 4], [0, 1, 0, 1], [2, -100, 4, -100], (0, 2, 4),
        ),
        (  # packed in two rows
            {"input_ids": rows([1, 2, 3], [4, 5, 6]), "labels": rows([1, 2, 3], [4, 5, 6]),
             "position_ids": rows([0, 1, 0], [0, 1, 2])},
            [1, 2, 3, 4, 5, 6], [0, 1, 0, 0, 1, 2], [2, 3, -100, 5, 6, -100], (0, 2, 3, 6),
        ),
        (  # filled up, at the end and at the start
            {"input_ids": rows([1, 2, 0], [0, 5, 6]), "labels": rows([1, 2, -100], [-100, 5, 6]),
             "attention_mask": rows([1, 1, 0], [0, 1, 1])},
            [1, 2, 5, 6], [0, 1, 0, 1], [2, -100, 6, -100], (0, 2, 4),
        ),
        (  # positions that start anywhere are no new document; kinds of tokens, all text
            {"input_ids": rows([1, 2]), "mm_token_type_ids": rows([0, 0]), "position_ids": rows([7, 8]),
             "shift_labels": rows([2, 9])},
            [1, 2], [7, 8], [2, 9], None,
        ),
    ],
)  # fmt: skip
def test_documents_and_padding(batch: Any, ids: Any, positions: Any, targets: Any, documents: Any) -> None:
    found = lasp.hf.shard(batch, None)
    assert [found[name].tolist() for name in ("input_ids", "position_ids", "shift_labels")] == [
        [ids], [positions], [targets]
    ]  # fmt: skip
    assert found["lasp_shard"].cu_seqlens == documents
    assert found["lasp_shard"].targets == sum(target != -100 for target in targets)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pixel_values": torch.zeros(1)}, "batch has pixel_values, of which it is not known how to split it"),
        ({"token_type_ids": IDS}, "batch has token_type_ids"),
        ({"input_ids": torch.zeros(2, 6)}, r"input_ids must be integers \[B, T\]"),
        ({"input_ids": IDS[0]}, r"input_ids must be integers \[B, T\] with tokens, got torch.int64 \[6\]"),
        ({"labels": IDS[:, 1:]}, r"labels must have the shape of input_ids, \[2, 6\], got \[2, 5\]"),
        ({"seq_idx": IDS}, "batch has seq_idx without position_ids"),
        ({"attention_mask": torch.ones(2, 6).tril(3)}, "labels of padding must be -100"),
        ({"attention_mask": 1 - torch.eye(2, 6)[:, [1, 0, 2, 3, 4, 5]]}, "without padding between"),
        ({"attention_mask": torch.zeros(2, 6)}, "at least one, without padding between"),
        ({"lengths": (5,)}, r"for each of the 1 ranks and sum to the 6 tokens of the sequence, got \(5,\)"),
        ({"sp": "ring"}, "sp must be a SequenceParallel or None, got str"),
    ],
)
def test_what_cannot_be_split_is_refused(changed: dict[str, Any], message: str) -> None:
    batch = {"input_ids": IDS, "labels": IDS} | {k: v for k, v in changed.items() if k not in ("lengths", "sp")}
    with pytest.raises(ValueError, match=message):
        lasp.hf.shard(batch, changed.get("sp"), changed.get("lengths"))
