"""TRL's SFTTrainer over ranks against itself in one process: losses, norms, what it counts, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import world
from hf.small_models import VOCABULARY, build, tokens
from hf.trainer.processes import as_process
from hf.trainer.test_attach import SETTINGS, Bounds, compare
from hf.trainer.with_lora import lora

import lasp
import lasp.hf

COUNTS = ("entropy", "mean_token_accuracy", "num_tokens")


@pytest.fixture(autouse=True)
def loaded() -> None:
    """Here, and not in every process that is forked."""
    import trl.trainer.sft_trainer  # noqa: F401


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "0")), pad_token="0", eos_token="2"
    )


def rows(count: int, seed: int) -> Any:
    """Examples of several lengths, whose first tokens, as those of a question, have no label."""
    import pyarrow
    from datasets import Dataset

    found = [row[: 8 + 5 * number % 17].tolist() for number, row in enumerate(tokens(count, 24, seed=seed))]
    table = pyarrow.Table.from_pylist([{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in found])
    # Or datasets pickles pyarrow, which works only where that is installed as usual.
    return Dataset(table, fingerprint=f"{count}-{seed}")


def supervised(folder: Path, model: Any, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    settings = SETTINGS | {
        "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False,
    }  # fmt: skip
    arguments = SFTConfig(str(folder), **(settings | options))
    return SFTTrainer(
        model, arguments, train_dataset=rows(100, 1), eval_dataset=rows(8, 2), processing_class=tokenizer()
    )


@pytest.mark.parametrize(
    ("size", "split", "kind", "padding_free"),
    [(2, 2, "mamba2", True), (4, 2, "lora", False), (2, 2, "router", False)],
)
def test_supervised_finetuning_over_ranks(size: int, split: int, kind: str, padding_free: bool, tmp_path: Path) -> None:
    """The whole is padded: without our operators nothing else is computed on a CPU."""

    def made(padding_free: bool) -> Any:
        model = build("mamba2" if kind == "mamba2" else "qwen3_next", router_loss=kind == "router")
        router = {"router_aux_loss_coef": 0.1 if kind == "router" else 0.0}
        model = lora(model) if kind == "lora" else model
        return supervised(tmp_path, model, padding_free=padding_free, **({} if kind == "mamba2" else router))

    # TRL computes the loss in fp32 whatever the model's dtype.
    bounds = Bounds(losses=1e-5 if padding_free else 1e-6, norms=1e-4, weights=1e-2)
    compare(size, split, lambda rank: made(padding_free), lambda: made(False), *COUNTS, bounds=bounds)


def test_other_trainers_are_refused(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        as_process(0, 1)
        made = supervised(tmp_path, build("mamba2"))
        made.__class__ = type("OwnTrainer", (type(made),), {"compute_loss": lambda *_, **__: None})
        with pytest.raises(ValueError, match="OwnTrainer computes a loss of its own"):
            lasp.hf.attach(made, lasp.SequenceParallel(dist.group.WORLD))

    world.run(1, work)
