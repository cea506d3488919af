"""Prepares a run's text: its tokens, the order of its sequences, and the words that its sample begins with."""

from pathlib import Path
from typing import NamedTuple

from lasp.data import store as token_store
from lasp.data.batches import Sequences
from lasp.data.store import TokenStore
from lasp.data.tokenizer import Tokenizer
from lasp.errors import ConfigError, DataError
from lasp.train.checkpoint import Checkpoint
from lasp.train.config import TrainConfig
from lasp.train.position import Position
from lasp.train.sample import first_words
from lasp.train.world import World


class RunText(NamedTuple):
    """The text of a run.

    Attributes:
        tokenizer, store: its tokens, and what they stand for.
        sequences: in the order of training.
        prompt: of the run's sample: as asked for, else the first words of the held-out text.
    """

    tokenizer: Tokenizer
    store: TokenStore
    sequences: Sequences
    prompt: str


def prepare(config: TrainConfig, tokenizer: Tokenizer) -> Path:
    """Find the folder of the run's tokens, and build it if it is not there, on the first process. Raises DataError."""
    return token_store.prepare(
        folder=config.data.path,
        suffixes=config.data.suffixes,
        field=config.data.field,
        tokenizer=tokenizer,
        validation_fraction=config.data.validation_fraction,
        seed=config.data.seed,
        cache=config.data.cache,
        validation_path=config.data.validation_path,
        on_bad_record=config.data.on_bad_record,
        verify=config.data.verify,
    ).folder


def open_text(
    config: TrainConfig,
    folder: Path,
    tokenizer: Tokenizer,
    world: World,
    *,
    vocab_size: int,
    start: Position,
    resumed: Checkpoint | None,
) -> RunText:
    """The text in `folder` as `prepare` gave it; collective. vocab_size: of the model. start: where the run begins.

    Raises ConfigError, on all processes, if they find other text than one another, or more ids than the model has;
    DataError if it is not the text of `resumed`, or too little.
    """
    store = token_store.open_store(folder, verify=False)
    if store.vocab_size > vocab_size:
        raise ConfigError(
            f"the model's vocabulary of {vocab_size:,} is smaller than that of the text, "
            f"{store.vocab_size:,}: leave vocab_size out of --model.overrides"
        )
    if resumed is not None and resumed.state["data"]["key"] != store.key:
        raise DataError(
            f"the text has changed since {resumed.folder} was written, so its run cannot be continued "
            "on the same data: restore the text and --data options, or start a new run"
        )
    if len(store.validation) < 2:
        raise DataError(
            "no text is held out to validate on: raise --data.validation-fraction, or name some with "
            "--data.validation-path"
        )
    world.compare({"data key": store.key})
    given = config.sample.prompt
    prompt = first_words(store, tokenizer) if given is None else given
    sequences = Sequences(
        store.train,
        seq_len=config.seq_len,
        seed=config.seed,
        bounds=store.train_bounds if config.data.packed else None,
        consecutive=config.data.carry,
        origin=start[:2],
    )
    return RunText(tokenizer, store, sequences, prompt)
