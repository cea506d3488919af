"""A run's figures, read back from what TensorBoard and wandb wrote on this machine."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import small_config
from wandb.proto import wandb_internal_pb2

from lasp.train import trainer
from lasp.train.logging.metrics import read_metrics


def records(content: bytes) -> Iterator[bytes]:
    """The records of an offline run's file: LevelDB's log format after a header of 7 bytes."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if (left := -place % 32768) and left < 7:  # too little of a block for a header is padding
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def wandb_history(folder: Path) -> list[dict[str, float]]:
    """Every row that offline runs logged, the oldest run first."""
    rows = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for content in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_trackers_have_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = small_config(tmp_path, sp=1, steps=4, save_every=2, track=("tensorboard", "wandb"))
    trainer.train(config)
    run_dir = tmp_path / "run"
    longer = dataclasses.replace(config, steps=6)
    (run_dir / "checkpoints" / "step-00000004").rename(tmp_path / "aside")
    trainer.train(longer, resume=run_dir)  # from step 2: steps 3 and 4 are written anew
    steps = [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    for tag, name in (("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("speed/tokens_per_s", "tokens_per_s")):
        found = board.Scalars(tag)
        assert [event.step for event in found] == [line["step"] for line in steps]
        assert [event.value for event in found] == pytest.approx([line[name] for line in steps], rel=1e-6)
    assert board.Scalars("validation/validation_bits_per_byte")

    assert (run_dir / "wandb-id").read_text()
    rows = wandb_history(run_dir)
    losses = {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {line["step"]: pytest.approx(line["loss"]) for line in steps}
