"""Validation in bits per byte of text, the same for any layout and any tokenizer."""

import math
from typing import NamedTuple

import numpy as np
import torch

from lasp.data.batches import validation_batch
from lasp.data.store import TokenStore
from lasp.parallelize import ParallelModel
from lasp.train.world import World


class Score(NamedTuple):
    bits_per_byte: float
    num_tokens: int
    """Tokens scored: the first of the validation stream."""


def evaluate(
    model: ParallelModel,
    store: TokenStore,
    world: World,
    *,
    seq_len: int,
    num_rows: int,
    max_sequences: int,
    packed: bool,
    autocast_dtype: torch.dtype | None,
) -> Score:
    """Score the model on the first `max_sequences` validation sequences of `seq_len` tokens; collective.

    num_rows: sequences read at a time by all processes together, a multiple of the data-parallel size. Every
    sequence starts without memory, so its first bytes are predicted from little: the score is a little
    pessimistic, never optimistic. packed: documents too, as a model trained on packed sequences knows them. The last
    sequence may be shorter, so that every token but the first is scored once.
    """
    num_tokens = min(max_sequences * seq_len, len(store.validation) - 1)
    end = -(-num_tokens // seq_len)
    bounds = store.validation_bounds if packed else None
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    model.module.eval()
    with torch.no_grad():
        for first in range(0, end, num_rows):
            batch = validation_batch(store.validation, first, num_rows, end, seq_len, world.shard, bounds)
            with torch.autocast(world.device.type, autocast_dtype, enabled=autocast_dtype is not None):
                out = model.module(
                    torch.from_numpy(batch.tokens).to(world.device),
                    labels=torch.from_numpy(batch.labels).to(world.device),
                    cu_seqlens=batch.cu_seqlens,
                    sp=model.sp,
                )
            nats += out.loss_sum
    model.module.train()
    model.release()
    total = sum(row[0] for row in world.gather([nats.item()]))
    return Score(total / math.log(2) / num_text_bytes(store, num_tokens), num_tokens)


def num_text_bytes(store: TokenStore, num_tokens: int) -> float:
    """Bytes of text in the labels of the first `num_tokens` validation tokens.

    Exact for bytes; for other tokenizers the validation text's average.
    """
    if store.tokenizer == "bytes":
        return float(np.count_nonzero(store.validation[1 : num_tokens + 1] < 256))
    return num_tokens * store.num_bytes["validation"] / len(store.validation)
