"""Packed training: documents kept apart, the same at every layout, and the same as every document by itself."""

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_layouts import furthest, losses
from training_runs import small_config, write_text

from lasp.data import store as token_store
from lasp.data.batches import Sequences, Shard
from lasp.data.tokenizer import ByteTokenizer
from lasp.models import CausalLM
from lasp.parallelize import ParallelModel
from lasp.train import step, trainer
from lasp.train.config import OptimizerOptions, TrainConfig
from lasp.train.evaluate import Score, evaluate
from lasp.train.model import model_config
from lasp.train.sample import load
from lasp.train.world import World

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


@pytest.mark.ci
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


def separators_end_documents() -> None:
    """The same tokens and labels, but a separator belongs to the document before: what that leaves behind reaches the
    first token of the next."""
    original = step.Sequences.batch

    def late(self: Sequences, *arguments: object, **options: object) -> object:
        batch = original(self, *arguments, **options)  # type: ignore[arg-type]
        first, *cuts, end = batch.cu_seqlens
        return batch._replace(cu_seqlens=(first, *(cut if cut % 64 == 0 else cut + 1 for cut in cuts), end))

    step.Sequences.batch = late  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("broken", [documents_run_together, separators_end_documents])
def test_control(folder: Path, reference: list[float], broken: object) -> None:
    run_dir = folder / f"broken-{broken.__name__}"  # type: ignore[attr-defined]
    config = packed_config(folder, dp=2, sp=2, run_dir=run_dir)
    assert furthest(losses(config, 4, before=broken), reference) > 1e-4  # type: ignore[arg-type]


def test_loss_is_that_of_every_document_by_itself(folder: Path, reference: list[float]) -> None:
    """The first loss again, from the text: each piece of a document that lies in a sequence, alone, after the separator
    before it if that lies there too."""
    config = packed_config(folder)
    tokenizer = ByteTokenizer()
    options: dict[str, Any] = {"folder": config.data.path, "suffixes": (".txt",), "validation_fraction": 0.2, "seed": 0}
    stream = token_store.prepare(tokenizer=tokenizer, cache=config.data.cache, **options).train
    sequences = Sequences(stream, seq_len=64, seed=0)
    torch.manual_seed(0)
    model = CausalLM(model_config(config, tokenizer.vocab_size))
    nats, count = 0.0, 0
    for row in range(config.global_batch):
        start = sequences.shuffled(row) * 64
        window = np.asarray(stream[start : start + 65]).astype(np.int64)
        starts = [0, *(place for place in range(1, 64) if window[place] == tokenizer.separator), 64]
        for begin, end in itertools.pairwise(starts):
            tokens = torch.from_numpy(window[begin : end + 1])[None]
            nats += model(tokens[:, :-1], labels=tokens[:, 1:]).loss_sum.item()
            count += end - begin
    assert count == 64 * config.global_batch
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
    assert whole.labels[0].tolist() == [token + 1 for token in whole.tokens[0]]
    separators = set((bounds[1:] - 1).tolist())  # of the document before, where the next one starts
    cuts = [i for i, token in enumerate(whole.tokens[0]) if i % 8 == 0 or token - 100 in separators]
    assert whole.cu_seqlens == (*cuts, 32) and sequences.num_targets(4) == 32


def test_validation_scores_what_is_trained(tmp_path: Path) -> None:
    """Records `<word> word word.`: the score of a packed run is that of every record read alone, after a separator; and
    an empty prompt begins a record. The control scores the same model as if documents ran on."""
    source = random.Random(1)
    words = ["".join(source.choices("abcdefgh", k=4)) for _ in range(400)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps({"text": f"<{w}> {w} {w}."}) + "\n" for w in words))
    config = small_config(tmp_path, steps=40, optimizer=OptimizerOptions(lr=1e-2, warmup_steps=4), eval_sequences=1000)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packed=True, suffixes=(".jsonl",)))
    score = trainer.train(config).bits_per_byte
    model, tokenizer, *_ = load(config.run_dir, report=pytest.fail)  # type: ignore[arg-type]
    (key,) = (path for path in config.data.cache.iterdir() if path.is_dir())
    store = token_store.open_store(key, verify=True)

    def scored(packed: bool) -> Score:
        whole = ParallelModel(model, model, None)
        one = World(0, 1, torch.device("cpu"), Shard())
        options = {"seq_len": 64, "num_rows": 3, "max_sequences": 1000, "autocast_dtype": None}
        return evaluate(whole, store, one, packed=packed, **options)  # type: ignore[arg-type]

    rows = store.validation[:]
    starts = {0, *range(64, len(rows) - 1, 64), *(store.validation_bounds[1:-1] - 1).tolist()}
    nats = 0.0
    for begin, end in itertools.pairwise([*sorted(starts), len(rows) - 1]):
        tokens = torch.from_numpy(rows[begin : end + 1])[None]
        with torch.no_grad():
            nats += model(tokens[:, :-1], labels=tokens[:, 1:]).loss_sum.item()
    expected = nats / math.log(2) / np.count_nonzero(rows[1:] < 256)
    assert scored(packed=True).num_tokens == len(rows) - 1  # the last, shorter sequence too
    assert scored(packed=True).bits_per_byte == pytest.approx(expected, rel=1e-5) == pytest.approx(score, rel=1e-5)
    assert scored(packed=False).bits_per_byte > 1.05 * expected
    with torch.no_grad():
        first = model(torch.tensor([[tokenizer.separator]])).logits[0, -1].softmax(-1)
    assert first[ord("<")] > 0.5  # never learned, it is 1 in 257
