"""Models of Hugging Face transformers with their sequences over ranks: recurrences, convolutions and softmax layers.

    sp = lasp.SequenceParallel(mesh["sp"])
    model = lasp.hf.parallelize(model, sp)                   # the same object
    loss = model(**lasp.hf.shard(batch, sp)).loss            # that of the whole batch, on every rank

Gradients are to be averaged over the ranks, as DDP, FSDP and accelerate do. transformers is loaded when first used.
"""

from lasp.exchange.start import keeping_exchanges
from lasp.hf.check import Comparison, check
from lasp.hf.describe import LayerReport, describe
from lasp.hf.parallelize import parallelize, restore
from lasp.hf.prefill import PrefilledCache, prefill
from lasp.hf.shards import BatchShard, shard
from lasp.hf.training import attach

__all__ = [
    "BatchShard",
    "Comparison",
    "LayerReport",
    "PrefilledCache",
    "attach",
    "check",
    "describe",
    "keeping_exchanges",
    "parallelize",
    "prefill",
    "restore",
    "shard",
]
