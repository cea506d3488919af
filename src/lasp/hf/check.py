"""Compare a parallelized model with itself unsplit, by logits and gradients of a few tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasp.hf.hooks import hooks_of
from lasp.hf.shards import shard
from lasp.hf.split import ModelSplit
from lasp.sequence import SequenceParallel, balanced_lengths

# transformers computes recurrences in fp32 whatever the model's dtype; a lost state is off by 1e-2 and more.
BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}


class Comparison(NamedTuple):
    """Relative errors ||split - whole|| / ||whole||, the largest over ranks.

    Attributes:
        gradients: of all parameters together; `parameter` is the one that is furthest off, by `worst`.
        bound: below which the errors of loss, logits and gradients are those of rounding.
    """

    loss: float
    logits: float
    gradients: float
    parameter: str
    worst: float
    bound: float

    @property
    def passes(self) -> bool:
        """The split model is the same model."""
        return max(self.loss, self.logits, self.gradients) < self.bound


def check(model: nn.Module, sp: SequenceParallel | None, *, tokens: int | None = None, seed: int = 0) -> Comparison:
    """Compare a parallelized model with itself unsplit, on random tokens. Collective over the ranks.

    Each rank runs the whole once. Gradients that parameters have are left alone.

    Args:
        tokens: of each of two sequences; 16 a rank by default. The first rank gets a single one.
        seed: of the tokens.

    Raises:
        ValueError: the model is not parallelized over these ranks, or there are too few tokens.
    """
    split = next((hook.split for hook in hooks_of(model)), None)
    if split is None or split.sp is not sp:
        raise ValueError("check compares a model that is parallelized over sp: lasp.hf.parallelize(model, sp) first")
    size = 1 if sp is None else sp.size
    tokens = 16 * size if tokens is None else tokens
    if tokens < 2 * size:
        raise ValueError(f"tokens must be at least 2 a rank, {2 * size}, got {tokens}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (2, tokens), generator=random).to(device)
    lengths = (1, *balanced_lengths(tokens - 1, size - 1)) if size > 1 else (tokens,)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    part = shard(batch, sp, lengths)
    loss, logits, gradients = _measured(model, parameters, part)
    whole_loss, whole_logits, whole = _whole(model, parameters, batch, split)
    start = sum(lengths[: 0 if sp is None else sp.rank])
    whole_logits = whole_logits[:, start : start + logits.shape[1]]
    if sp is not None:
        gradients = {name: sp.sum(gradient) / size for name, gradient in gradients.items()}
    errors = {name: _error(gradients[name], whole[name]) for name in whole}
    worst = max(errors, key=lambda name: errors[name])
    total = _norm(gradients[name].double() - whole[name].double() for name in whole) / _norm(whole.values())
    found = torch.tensor([_error(loss, whole_loss), _error(logits, whole_logits), total, errors[worst]]).nan_to_num(
        float("inf")
    )
    if sp is not None and size > 1:
        found = torch.stack([sp.broadcast(found, rank) for rank in range(size)]).amax(0)
    of_loss, of_logits, of_gradients, largest = found.tolist()
    return Comparison(of_loss, of_logits, of_gradients, worst, largest, BOUNDS[next(model.parameters()).dtype])


def _measured(model: nn.Module, parameters: dict[str, nn.Parameter], batch: dict[str, Any]) -> Any:
    """Loss, logits and the gradients of the parameters, zero where the loss does not depend on one."""
    with torch.enable_grad():
        output = model(**batch, use_cache=False)
        found = torch.autograd.grad(output.loss, list(parameters.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)
    }
    return output.loss.detach(), output.logits.detach(), gradients


def _whole(model: nn.Module, parameters: dict[str, nn.Parameter], batch: dict[str, Any], split: ModelSplit) -> Any:
    split.is_whole = True
    try:
        return _measured(model, parameters, batch)
    finally:
        split.is_whole = False


def _norm(tensors: Any) -> float:
    return float(sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5)


def _error(value: Tensor, reference: Tensor) -> float:
    size = reference.double().norm().item()
    return (value.double() - reference.double()).norm().item() / (size if size > 0 else 1.0)
