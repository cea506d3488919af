"""transformers' Trainer, its sequences over ranks: each batch comes once for all ranks of a group, who split it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import RandomSampler, Sampler, SequentialSampler

from lasp.hf import library
from lasp.hf.dispatch import dispatch
from lasp.hf.hooks import hooks_of
from lasp.hf.parallelize import parallelize
from lasp.hf.shards import shard
from lasp.hf.table import SHARED_LOSSES
from lasp.sequence import SequenceParallel


def attach(trainer: Any, sp: SequenceParallel, **options: Any) -> Any:
    """Let transformers' Trainer or TRL's SFTTrainer train, and evaluate the loss, with its sequences over ranks.

    Its model is parallelized, if it is not. All else stays the Trainer's: a batch of `per_device_train_batch_size` rows
    comes once for every group of ranks, and loss, gradient norms, clipping, accumulation and logs are those of as many
    processes as there are groups. Examples that fill no batch for every group are left out in training.

    Args:
        trainer: before train(), made with all that it needs.
        sp: the ranks that share sequences: consecutive ones, so the innermost dim of a mesh.
        options: those of `lasp.hf.parallelize`.

    Returns:
        the trainer.

    Raises:
        ValueError: the trainer does something that cannot be split, with a remedy.
    """
    _check(trainer, sp)
    if next(hooks_of(trainer.model), None) is None:
        parallelize(trainer.model, sp, **options)
    groups, args = trainer.args.world_size // sp.size, trainer.args
    is_sft = _is_sft(trainer)
    # SFTTrainer counts the tokens of one row.
    trainer.data_collator = SplitCollator(trainer.data_collator, sp, one_row=is_sft)
    if is_sft:
        dispatch(SHARED_LOSSES)
        trainer.compute_loss = partial(_supervised_loss, trainer, trainer.compute_loss, groups)
    # accelerate drops results of examples with which it has filled up a last batch, as many as it would without ranks
    # that share batches. Here every batch is full.
    trainer.accelerator.gather_for_metrics = partial(_gather_all, trainer.accelerator)
    trainer.gather_function = trainer.accelerator.gather_for_metrics
    of_training, of_evaluation = trainer._get_train_sampler, trainer._get_eval_sampler

    def train_sampler(dataset: Any = None) -> Sampler[int]:
        sampler = of_training(dataset)
        if isinstance(sampler, RandomSampler):  # as accelerate has it, which knows no sampler that is wrapped
            seed = args.seed if args.data_seed is None else args.data_seed
            sampler = library.seedable_sampler(sampler.data_source, torch.Generator(), seed)
        return SharedBatches(sampler, args.train_batch_size, groups, sp.size)

    def eval_sampler(dataset: Any) -> Sampler[int]:
        _check_evaluation(dataset, args.eval_batch_size * groups)
        return SharedBatches(
            of_evaluation(dataset) or SequentialSampler(dataset), args.eval_batch_size, groups, sp.size
        )

    trainer._get_train_sampler, trainer._get_eval_sampler = train_sampler, eval_sampler
    trainer.add_callback(_first_step_callback(sp))
    return trainer


class SplitCollator:
    """Collates examples as before, and keeps this rank's part. one_row: of the rows one after another."""

    def __init__(self, collate: Callable[[Any], Any], sp: SequenceParallel, *, one_row: bool = False) -> None:
        self.collate, self.sp, self.one_row = collate, sp, one_row

    def __call__(self, examples: Any) -> dict[str, Any]:
        return shard(self.collate(examples), self.sp, one_row=self.one_row)


def _gather_all(accelerator: Any, data: Any, use_gather_object: bool = False) -> Any:
    """accelerate's gather_for_metrics, of batches that are full."""
    if use_gather_object:
        return import_module("accelerate.utils").gather_object(data)
    return accelerator.gather(data)


def _supervised_loss(
    trainer: Any,
    compute_loss: Callable[..., Any],
    groups: int,
    model: Any,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    """SFTTrainer.compute_loss. In evaluation it takes the mean over the tokens that are here, not of the batch."""
    if num_items_in_batch is not None:
        return compute_loss(model, inputs, return_outputs, num_items_in_batch)
    # It multiplies by the number of processes, and Trainer takes the mean over them. A router's loss is for each batch:
    # in training this number is set anew for every step.
    trainer.current_gradient_accumulation_steps = 1
    return compute_loss(model, inputs, return_outputs, inputs["lasp_shard"].targets * groups)


class SharedBatches(Sampler[int]):
    """Examples in the order of `sampler`, each batch once for every rank of the group that shares it.

    accelerate deals batches to processes one by one. A batch that is not full, or not there for every group, is left
    out.
    """

    def __init__(self, sampler: Any, batch_size: int, groups: int, ranks: int) -> None:
        self.sampler, self.batch_size, self.groups, self.ranks = sampler, batch_size, groups, ranks

    def __iter__(self) -> Iterator[int]:
        examples = iter(self.sampler)
        for _ in range(len(self) // self.ranks // self.batch_size):
            batch = list(islice(examples, self.batch_size))
            for _ in range(self.ranks):
                yield from batch

    def __len__(self) -> int:
        of_all = self.batch_size * self.groups
        return len(self.sampler) // of_all * of_all * self.ranks

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def _first_step_callback(sp: SequenceParallel) -> Any:
    """A callback that compares the ranks' weights after the first step.

    A model that is evaluated before it is trained stays without DDP, and then gradients are not averaged.
    """

    class SameWeights(library.load().TrainerCallback):  # type: ignore[misc]
        compared = False

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if not self.compared and model is not None and sp.size > 1:
                self.compared = True
                check_same([p for p in model.parameters() if p.requires_grad], sp)

    return SameWeights()


def check_same(parameters: Sequence[Tensor], sp: SequenceParallel) -> None:
    """The ranks have the same weights, to the bit; those of FSDP, of which each has a share, are passed over.

    Raises:
        RuntimeError: they have not, on every rank.
    """
    local = [p.detach() for p in parameters if not isinstance(p, DTensor)]
    if not local:
        return
    sums = torch.stack([weight.double().sum() for weight in local])
    first = sp.broadcast(sums, 0)
    differs = sp.sum((first != sums).any().to(sums.dtype)[None])
    if bool(differs > 0):
        raise RuntimeError(
            "after the first step the ranks have different weights: their gradients are not averaged. Trainer leaves a "
            "model without DDP that is evaluated before it is trained: call train() first"
        )


def _check(trainer: Any, sp: SequenceParallel) -> None:
    kind = library.load().Trainer
    if not isinstance(trainer, kind):
        raise ValueError(f"trainer must be a Trainer of transformers, got {type(trainer).__name__}")
    if not isinstance(sp, SequenceParallel):
        raise ValueError(f"sp must be a SequenceParallel, got {type(sp).__name__}")
    if type(trainer).compute_loss is not kind.compute_loss and not _is_sft(trainer):
        raise ValueError(
            f"{type(trainer).__name__} computes a loss of its own, which need not be a sum over tokens: use Trainer or "
            "TRL's SFTTrainer"
        )
    if isinstance(trainer.data_collator, SplitCollator):
        raise ValueError("the trainer is attached already")
    ranks = list(sp.comm.global_ranks)
    if ranks != list(range(ranks[0], ranks[0] + sp.size)) or ranks[0] % sp.size:
        raise ValueError(f"sp must be consecutive processes, the innermost dim of a mesh, got {ranks}")
    args = trainer.args
    refused = {
        "average_tokens_across_devices=False": not args.average_tokens_across_devices,
        "label_smoothing_factor": args.label_smoothing_factor,
        "compute_metrics": trainer.compute_metrics is not None,
        "compute_loss_func": trainer.compute_loss_func is not None,
        "split_batches": args.accelerator_config.split_batches,
        "dispatch_batches": args.accelerator_config.dispatch_batches,
        "train_sampling_strategy='batch_rebalance'": args.train_sampling_strategy == "batch_rebalance",
        "several GPUs in one process": args.n_gpu > 1,
        "a data set without a length": any(
            data is not None and not hasattr(data, "__len__") for data in (trainer.train_dataset, trainer.eval_dataset)
        ),
    }
    if found := [name for name, given in refused.items() if given]:
        raise ValueError(f"the trainer cannot split sequences with {', '.join(found)}: leave it out")


def _is_sft(trainer: Any) -> bool:
    """Returns whether it is TRL's for supervised finetuning, with its own loss."""
    loss = type(trainer).compute_loss
    return (loss.__module__, loss.__qualname__) == ("trl.trainer.sft_trainer", "SFTTrainer.compute_loss")


def _check_evaluation(dataset: Any, of_all: int) -> None:
    if len(dataset) % of_all:
        raise ValueError(
            f"evaluation takes full batches for every group of ranks, {of_all} examples at a time, and there are "
            f"{len(dataset)}: choose per_device_eval_batch_size, or the examples, so that it divides"
        )
