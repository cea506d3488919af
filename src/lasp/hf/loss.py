"""The loss of a split batch: on every rank that of the whole, with gradients that ranks are to average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lasp.hf import library
from lasp.hf.context import ModelPass, split_pass
from lasp.hf.split import ModelSplit
from lasp.models.loss import IGNORED_LABEL, default_chunk_tokens
from lasp.recurrence.derivatives import first_derivatives
from lasp.sequence import SequenceParallel


class SharedLoss:
    """Stands in the place of a model's loss function, `original`, which it calls for whole batches.

    former: what the model itself had for one, where it did not have its class's.
    """

    def __init__(
        self, split: ModelSplit, original: Callable[..., Tensor], former: Callable[..., Tensor] | None
    ) -> None:
        self.split, self.original, self.former = split, original, former

    def __call__(self, logits: Tensor, labels: Tensor | None, vocab_size: int, **options: Any) -> Tensor:
        current = split_pass()
        shard = options.pop("lasp_shard", None) or (None if current is None else current.shard)
        if shard is None:
            return self.original(logits, labels, vocab_size, **options)
        if options.get("shift_labels") is None or shard.targets is None:
            raise ValueError("a split batch has shift_labels: give the whole batch's labels to lasp.hf.shard")
        if options.get("num_items_in_batch") is not None:  # the caller adds up the ranks' shares
            return self._share(logits, labels, vocab_size, options)
        share = self._share(logits, labels, vocab_size, {**options, "num_items_in_batch": shard.targets})
        return shared(share, self.split.arguments(shard).sp)

    def _share(self, logits: Tensor, labels: Tensor | None, vocab_size: int, options: dict[str, Any]) -> Tensor:
        """The sum over tokens here, divided as asked for; by the model's own function where it is another."""
        if self.original is not library.load("loss.loss_utils").ForCausalLMLoss:
            return self.original(logits, labels, vocab_size, **options)
        targets = options["shift_labels"].reshape(-1).to(logits.device)
        count = options["num_items_in_batch"]
        count = count.to(logits.device) if isinstance(count, Tensor) else count
        ignored = options.get("ignore_index", IGNORED_LABEL)
        return cross_entropy_of_logits(logits.reshape(-1, vocab_size), targets, ignored) / count


def cross_entropy_of_logits(
    logits: Tensor, labels: Tensor, ignored: int = IGNORED_LABEL, *, chunk_tokens: int | None = None
) -> Tensor:
    """Sum over tokens of -log softmax(logits)[label], in fp32, or in fp64 for logits in fp64.

    transformers makes a copy of all logits in fp32, and PyTorch one more for backward. Here a chunk is wide at a time,
    and what backward needs beside the logits is a number a token.

    Args:
        logits: [N, vocab].
        labels: int64 [N], `ignored` where there is none.
    """
    tokens = chunk_tokens or default_chunk_tokens(logits.shape[1], on_gpu=logits.is_cuda)
    loss: Tensor = _CrossEntropyOfLogits.apply(logits, labels, ignored, tokens)
    return loss


class _CrossEntropyOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignored: int, tokens: int) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        scales = logits.new_empty(len(logits), dtype=wide)
        total = logits.new_zeros((), dtype=wide)
        for chunk in _chunks(len(logits), tokens):
            part, targets = logits[chunk].to(wide), labels[chunk]
            scales[chunk] = part.logsumexp(-1)
            of_label = part.gather(1, targets.clamp(min=0)[:, None])[:, 0]
            total += (scales[chunk] - of_label).masked_fill(targets == ignored, 0.0).sum()
        ctx.save_for_backward(logits, labels, scales)
        ctx.ignored, ctx.tokens = ignored, tokens
        return total

    @staticmethod
    @first_derivatives("the loss")
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None, None]:
        """softmax - 1 at the label; there from the logarithm, or p - 1 is rounded to nothing where p is nearly 1."""
        logits, labels, scales = ctx.saved_tensors
        d_logits = torch.empty_like(logits)
        for chunk in _chunks(len(logits), ctx.tokens):
            targets = labels[chunk].clamp(min=0)[:, None]
            log_p = logits[chunk].to(scales.dtype) - scales[chunk, None]
            of_label = log_p.gather(1, targets).expm1()
            part = log_p.exp_().scatter_(1, targets, of_label).mul_(d_total)
            d_logits[chunk] = part.masked_fill_((labels[chunk] == ctx.ignored)[:, None], 0.0).to(logits.dtype)
        return d_logits, None, None, None


def _chunks(count: int, tokens: int) -> Iterator[slice]:
    return (slice(first, first + tokens) for first in range(0, count, tokens))


def shared(share: Tensor, sp: SequenceParallel | None) -> Tensor:
    """The sum of the ranks' shares, a scalar; the mean over ranks of its gradients is the gradient of that sum."""
    if sp is None or sp.size == 1:
        return share
    total: Tensor = _SharedSum.apply(share, sp)
    return total


class _SharedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, sp: SequenceParallel) -> Tensor:
        ctx.size = sp.size
        # Memory of its own: models add other losses in place.
        return sp.sum(share.detach()).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.size, None


def load_balancing_loss(
    current: ModelPass,
    gate_logits: tuple[Tensor, ...] | None,
    num_experts: int | None = None,
    top_k: int = 2,
    attention_mask: Tensor | None = None,
) -> Tensor | int:
    """transformers' load_balancing_loss_func of a split batch: experts are counted over all ranks.

    It is a product of two means over tokens, so the parts that ranks add up are E * sum_e f_e P_e / rows^2, with f the
    counts of all ranks and P the sum of probabilities here.
    """
    if not isinstance(gate_logits, tuple) or num_experts is None:
        return 0
    assert current.shard is not None
    sp = current.split.arguments(current.shard).sp
    weights = [logits.softmax(-1) for logits in gate_logits]
    chosen = torch.cat([layer.topk(top_k, -1).indices.flatten() for layer in weights])
    counts = torch.nn.functional.one_hot(chosen, num_experts).sum(0)
    probabilities = torch.stack([layer.float().sum(0) for layer in weights]).sum(0)
    rows = len(gate_logits) * gate_logits[0].shape[0] * sum(current.shard.lengths) // _own(current)
    counts = counts.to(probabilities.dtype)
    counts = counts if sp is None else sp.sum(counts)
    share = num_experts * (counts * probabilities).sum() / rows**2
    return share if current.num_items is not None else shared(share, sp)


def _own(current: ModelPass) -> int:
    assert current.shard is not None
    return current.shard.lengths[current.shard.rank]
