"""Passes and mixers that are running in this thread; a mixer runs within a pass, or in backward."""

from __future__ import annotations

import threading
from typing import NamedTuple

from torch import Tensor, nn

from lasp.hf.latents import LatentCache
from lasp.hf.shards import BatchShard
from lasp.hf.split import ModelSplit


class ModelPass(NamedTuple):
    """The forward pass of a model.

    Attributes:
        shard: what this rank has of the batch; None where the model runs whole.
        num_items: by what the caller has the loss divided (transformers' num_items_in_batch), or None.
    """

    split: ModelSplit
    shard: BatchShard | None
    module: nn.Module
    num_items: Tensor | int | None = None


class MixerFrame(NamedTuple):
    """A mixer that is running, in a pass or in a recomputation.

    Attributes:
        wanted: functions that it has still to call.
        latents: what gathers what its keys and values are made of, in place of these; see `lasp.hf.latents`.
    """

    split: ModelSplit
    shard: BatchShard | None
    module: nn.Module
    wanted: set[str]
    latents: LatentCache | None = None


class LayerFrame(NamedTuple):
    """A layer that is running, in a pass or in a recomputation, which may not hand on what it was told."""

    split: ModelSplit
    shard: BatchShard | None
    module: nn.Module


class _Running(threading.local):
    def __init__(self) -> None:
        self.passes: list[ModelPass] = []
        self.layers: list[LayerFrame] = []
        self.frames: list[MixerFrame] = []


running = _Running()


def split_pass() -> ModelPass | None:
    """The pass that is under way, if it is split."""
    current = running.passes[-1] if running.passes else None
    return None if current is None or current.shard is None else current


def split_frame() -> MixerFrame | None:
    """The mixer that is running, if its pass is split."""
    current = running.frames[-1] if running.frames else None
    return None if current is None or current.shard is None else current
