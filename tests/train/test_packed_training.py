"""Packed training: documents kept apart, the same at every layout, and the same as every document by itself."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from test_layouts import furthest, losses
from training_runs import small_config, write_text

from lasp.data import store as token_store
from lasp.data.batches import Sequences, Shard
from lasp.data.tokenizer import ByteTokenizer
from lasp.models import CausalLM
from lasp.train import loop, step
from lasp.train.config import TrainConfig

STEPS = 12


def packed_config(folder: Path, **changes: object) -> TrainConfig:
    """Documents of some 40 bytes in sequences of 64."""
    if not (folder / "text").exists():
        write_text(folder / "text", num_files=60, num_words=8)
    config = small_config(folder, steps=STEPS, **changes)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, packed=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[float]:
    return losses(packed_config(folder), 1)


@pytest.mark.parametrize(("dp", "sp", "accumulation"), [(2, 2, 1), (1, 4, 2)])
def test_every_layout_has_the_same_loss_curve(
    folder: Path, reference: list[float], dp: int, sp: int, accumulation: int
) -> None:
    run_dir = folder / f"run-{dp}-{sp}"
    config = packed_config(folder, dp=dp, sp=sp, accumulation=accumulation, run_dir=run_dir)
    assert furthest(losses(config, dp * sp), reference) < 1e-5


def documents_run_together() -> None:
    """The same tokens and labels, but what a document leaves behind reaches the next."""
    original = step.Sequences.batch

    def whole(self: Sequences, *arguments: object, **options: object) -> object:
        batch = original(self, *arguments, **options)  # type: ignore[arg-type]
        return batch._replace(cu_seqlens=(0, batch.cu_seqlens[-1]))

    step.Sequences.batch = whole  # type: ignore[method-assign, assignment]


def one_process_counts() -> None:
    """Losses divided by the labels that this process sees, not by those of the global batch."""
    step.Sequences.num_targets = lambda self, number, rows: int(  # type: ignore[method-assign]
        (self.batch(number, rows, Shard(dp_rank=0, dp_size=2, sp_rank=1, sp_size=2)).labels >= 0).sum() * 4
    )


@pytest.mark.parametrize("broken", [documents_run_together, one_process_counts])
def test_control(folder: Path, reference: list[float], broken: object) -> None:
    run_dir = folder / f"broken-{broken.__name__}"  # type: ignore[attr-defined]
    config = packed_config(folder, dp=2, sp=2, run_dir=run_dir)
    assert furthest(losses(config, 4, before=broken), reference) > 1e-4  # type: ignore[arg-type]


def test_loss_is_that_of_every_document_by_itself(folder: Path, reference: list[float]) -> None:
    """The first loss again, from the text: each piece of a document that lies in a sequence, alone."""
    config = packed_config(folder)
    tokenizer = ByteTokenizer()
    options = {"folder": config.data.path, "suffixes": (".txt",), "validation_fraction": 0.2, "seed": 0}
    stream = token_store.prepare(tokenizer=tokenizer, cache=config.data.cache, **options).train
    sequences = Sequences(stream, seq_len=64, seed=0)
    torch.manual_seed(0)
    model = CausalLM(loop.model_config(config, tokenizer.vocab_size))
    nats, count = 0.0, 0
    for row in range(config.global_batch):
        start = sequences.shuffled(row) * 64
        window = np.asarray(stream[start : start + 65]).astype(np.int64)
        pieces = np.split(window, np.flatnonzero(window[:-1] == tokenizer.separator) + 1)
        for piece in pieces:
            if len(piece) > 1:
                tokens = torch.from_numpy(piece)[None]
                nats += model(tokens[:, :-1], labels=tokens[:, 1:]).loss_sum.item()
                count += len(piece) - 1
    assert abs(nats / count / reference[0] - 1) < 1e-5


@pytest.mark.parametrize("sp", [1, 2, 4])
def test_shards_are_the_batch(sp: int) -> None:
    """Documents of one token, documents over several sequences, borders on the rows' own."""
    bounds = np.array([0, 1, 2, 5, 8, 16, 17, 40, 41, 64])
    stream = np.arange(100, 164)
    sequences = Sequences(stream, seq_len=8, seed=1, bounds=bounds)
    whole = sequences.batch(0, 4, Shard())
    parts = [sequences.batch(0, 4, Shard(sp_rank=rank, sp_size=sp)) for rank in range(sp)]
    assert {part.cu_seqlens for part in parts} == {whole.cu_seqlens}
    assert np.array_equal(np.concatenate([part.tokens for part in parts], 1), whole.tokens)
    assert np.array_equal(np.concatenate([part.labels for part in parts], 1), whole.labels)
    starts = set(bounds[1:].tolist())
    expected = [-100 if token - 100 + 1 in starts else token + 1 for token in whole.tokens[0]]
    assert whole.labels[0].tolist() == expected
    cuts = [i for i, token in enumerate(whole.tokens[0]) if i % 8 == 0 or token - 100 in starts]
    assert whole.cu_seqlens == (*cuts, 32)
    assert sequences.num_targets(0, 4) == (whole.labels >= 0).sum()
