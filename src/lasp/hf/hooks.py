"""Hooks of a model's modules: they say what splits a pass, hand it on to the layers, and see that mixers obey.

What splits a pass travels among the keyword arguments, so that layers which backward recomputes have their own again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lasp.hf.context import LayerFrame, MixerFrame, ModelPass, running, split_pass
from lasp.hf.latents import LatentCache, has_latents
from lasp.hf.library import CACHES, cache_argument
from lasp.hf.shards import BatchShard
from lasp.hf.split import ModelSplit
from lasp.recurrence.untraced import untraced
from lasp.sequence.sequence_parallel import broadcast_errors

KEY = "lasp_shard"
Keywords = dict[str, Any]


class Hook:
    """Base of this library's hooks, by which they are found again, also on a model's copy."""

    def __init__(self, split: ModelSplit, name: str) -> None:
        self.split, self.name = split, name


class ModelEnters(Hook):
    """Runs before a model, or one within it: the outermost begins the pass, the others are told of it."""

    def __call__(self, module: nn.Module, arguments: Any, options: Keywords) -> tuple[Any, Keywords]:
        return _enter_model(self, module, arguments, options)


class ModelLeaves(Hook):
    """Runs after a model: the outermost ends the pass."""

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        _leave_model(module)


class LayerEnters(Hook):
    """Tells a layer of the pass before it runs, and so its recomputation."""

    def __call__(self, module: nn.Module, arguments: Any, options: Keywords) -> tuple[Any, Keywords]:
        return _enter_layer(self, module, arguments, options)


class LayerLeaves(Hook):
    """Runs after a layer, also where it failed."""

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        _leave_layer(module)


class MixerEnters(Hook):
    """Runs before a mixer. wanted: the functions that it must call in a split pass."""

    def __init__(self, split: ModelSplit, name: str, wanted: frozenset[str]) -> None:
        super().__init__(split, name)
        self.wanted = wanted

    def __call__(self, module: nn.Module, arguments: Any, options: Keywords) -> tuple[Any, Keywords]:
        return _enter_mixer(self, module, arguments, options)


class MixerLeaves(Hook):
    """Runs after a mixer, also where it failed, and sees that it has called what it must."""

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        _leave_mixer(self, module, output)


@untraced
def _enter_model(hook: ModelEnters, module: nn.Module, arguments: Any, options: Keywords) -> tuple[Any, Keywords]:
    passes = running.passes
    # An interrupt leaves no time to end a pass; a model is not within itself.
    while any(begun.module is module for begun in passes):
        passes.pop()
        running.layers.clear()
        running.frames.clear()
    if passes and passes[-1].split is hook.split:
        return arguments, _told(hook.split, options)
    split, shard = hook.split, options.get(KEY)
    if shard is None:
        if torch.is_grad_enabled() and module.training and not split.is_whole:
            raise ValueError(
                f"{hook.name} is parallelized, and in training its batch must be split: "
                "model(**lasp.hf.shard(batch, sp)), or lasp.hf.restore(model) first"
            )
        passes.append(ModelPass(split, None, module))
        return arguments, options
    with broadcast_errors(split.sp):
        _check(split, shard, arguments, options)
    split.num_passes += 1
    if split.sp is not None and split.sp.size > 1:
        split.sp.begin_step(split.num_passes, shard.digest)
    passes.append(ModelPass(split, shard, module, options.get("num_items_in_batch")))
    # Where the caller does not say, a model may build a cache.
    return arguments, {"use_cache": False, **options}


@untraced
def _leave_model(module: nn.Module) -> None:
    if running.passes and running.passes[-1].module is module:
        running.passes.pop()


@untraced
def _enter_layer(hook: LayerEnters, module: nn.Module, arguments: Any, options: Keywords) -> tuple[Any, Keywords]:
    options = _told(hook.split, options)
    running.layers.append(LayerFrame(hook.split, options.get(KEY), module))
    return arguments, options


@untraced
def _leave_layer(module: nn.Module) -> None:
    while running.layers and running.layers.pop().module is not module:
        pass


def _told(split: ModelSplit, options: Keywords) -> Keywords:
    """The arguments, with what splits the pass, if one of this model is under way."""
    current = split_pass()
    if current is None or current.split is not split or KEY in options:
        return options
    return {**options, KEY: current.shard}


@untraced
def _enter_mixer(hook: MixerEnters, module: nn.Module, arguments: Any, options: Keywords) -> tuple[Any, Keywords]:
    shard = options.pop(KEY, None)
    if shard is None and running.layers and running.layers[-1].split is hook.split:
        shard = running.layers[-1].shard
    if shard is None and not hook.split.is_whole:
        current = split_pass()
        is_backward = torch._C._current_graph_task_id() != -1
        if (current is not None and current.split is hook.split) or is_backward:
            raise RuntimeError(
                f"{hook.name} was not told how its batch is split: what calls it drops keyword arguments"
                f"{', and this is its recomputation' if is_backward else ''}"
            )
    latents = None
    if shard is not None and hook.split.gathers_latents and has_latents(module):
        name = cache_argument(module)
        if name is not None and options.get(name) is None:
            latents = LatentCache(hook.split.arguments(shard).sp)
            options = {**options, name: latents}
    running.frames.append(MixerFrame(hook.split, shard, module, set(hook.wanted), latents))
    return arguments, options


@untraced
def _leave_mixer(hook: MixerLeaves, module: nn.Module, output: Any) -> None:
    frames = running.frames
    while frames and frames[-1].module is not module:
        frames.pop()
    frame = frames.pop() if frames else None
    # Without output it has failed, or backward has all that it wanted of a recomputation.
    if frame is not None and frame.shard is not None and output is not None and frame.wanted:
        raise RuntimeError(
            f"{hook.name} did not call {', '.join(sorted(frame.wanted))}, and so saw only the tokens of its rank: this "
            "transformers computes it in another way than lasp.hf knows"
        )


def _check(split: ModelSplit, shard: Any, arguments: Any, options: Keywords) -> None:
    """A split pass can begin.

    Raises:
        ValueError: it cannot, with a remedy.
    """
    if not isinstance(shard, BatchShard):
        raise ValueError(f"{KEY} must be what lasp.hf.shard gives, got {type(shard).__name__}")
    size, rank = (1, 0) if split.sp is None else (split.sp.size, split.sp.rank)
    if (len(shard.lengths), shard.rank) != (size, rank):
        raise ValueError(
            f"this is rank {rank} of {size}, and the batch is the part of rank {shard.rank} of {len(shard.lengths)}: "
            "give lasp.hf.shard the ranks that the model is parallelized over"
        )
    given = (options.get("input_ids"), options.get("inputs_embeds"), *arguments[:1])
    tokens = next((tensor.shape[1] for tensor in given if isinstance(tensor, Tensor) and tensor.dim() > 1), None)
    if tokens not in (None, shard.lengths[rank]):
        raise ValueError(
            f"the model is given {tokens} tokens, and this part of the batch has {shard.lengths[rank]}: call it with "
            "what lasp.hf.shard gives. PEFT's methods that add tokens, as prompt tuning, cannot be split: use LoRA"
        )
    if options.get("attention_mask") is not None:
        raise ValueError("attention_mask is for a whole batch: give it to lasp.hf.shard, which drops the padding")
    cached = [name for name in CACHES if options.get(name) is not None]
    if cached or (options.get("use_cache") and not split.is_prefill):
        raise ValueError(
            f"a split batch fills no cache: leave {', '.join(cached) or 'use_cache=True'} out; "
            "lasp.hf.prefill fills one. PEFT's prefix tuning is one too: use LoRA"
        )


def add(hook: Hook, module: nn.Module) -> None:
    """Register it, by its class."""
    if isinstance(hook, ModelEnters | LayerEnters | MixerEnters):
        module.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        module.register_forward_hook(hook, always_call=True)  # type: ignore[arg-type]


def hooks_of(model: nn.Module) -> Iterator[Hook]:
    """All of this library's on a model's modules."""
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, Hook):
                yield hook


def remove(model: nn.Module) -> None:
    """Take all of them away."""
    for module in model.modules():
        registries: tuple[tuple[dict[int, Callable[..., Any]], tuple[dict[int, bool], ...]], ...] = (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        )
        for hooks, notes in registries:
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]
                for note in notes:
                    note.pop(key, None)
