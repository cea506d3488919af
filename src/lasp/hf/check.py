"""Compare a parallelized model with itself unsplit, by logits and gradients of a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasp.hf.hooks import hooks_of
from lasp.hf.shards import shard
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


class LayerErrors(NamedTuple):
    """Relative errors of a layer's output and of its parameters' gradients, the largest over ranks.

    Attributes:
        sent_bytes: that this rank has sent in the layer's forward pass.
    """

    output: float
    gradients: float
    sent_bytes: int


def check(model: nn.Module, sp: SequenceParallel | None, *, tokens: int | None = None, seed: int = 0) -> Comparison:
    """Compare a parallelized model with itself unsplit, on random tokens. Collective over the ranks.

    Each rank runs the whole once. Gradients that parameters have are left alone.

    Args:
        tokens: of each of two sequences; 16 a rank by default. The first rank gets a single one.
        seed: of the tokens.

    Raises:
        ValueError: the model is not parallelized over these ranks, or there are too few tokens.
    """
    return check_layers(model, sp, (), tokens=tokens, seed=seed)[0]


def check_layers(
    model: nn.Module, sp: SequenceParallel | None, layers: Sequence[str], *, tokens: int | None = None, seed: int = 0
) -> tuple[Comparison, list[LayerErrors]]:
    """`check`, and the errors of layers of these names."""
    split = next((hook.split for hook in hooks_of(model)), None)
    if split is None or split.sp is not sp:
        raise ValueError("check compares a model that is parallelized over sp: lasp.hf.parallelize(model, sp) first")
    size = 1 if sp is None else sp.size
    tokens = 16 * size if tokens is None else tokens
    if tokens < 2 * size:
        raise ValueError(f"tokens must be at least 2 a rank, {2 * size}, got {tokens}")
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (2, tokens), generator=random).to(device)
    lengths = (1, *balanced_lengths(tokens - 1, size - 1)) if size > 1 else (tokens,)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    found = _measured(model, shard(batch, sp, lengths), layers, sp)
    split.is_whole = True
    try:
        whole = _measured(model, batch, layers, None)
    finally:
        split.is_whole = False
    start = sum(lengths[: 0 if sp is None else sp.rank])
    here = slice(start, start + lengths[0 if sp is None else sp.rank])
    gradients = found.gradients
    if sp is not None:
        gradients = {name: sp.sum(gradient) / size for name, gradient in gradients.items()}
    errors = {name: _error(gradients[name], whole.gradients[name]) for name in whole.gradients}
    worst = max(errors, key=lambda name: errors[name])
    total = _norm(gradients[name].double() - whole.gradients[name].double() for name in errors)
    values = [
        _error(found.loss, whole.loss),
        _error(found.logits, whole.logits[:, here]),
        total / _norm(whole.gradients.values()),
        errors[worst],
    ]
    for layer in layers:
        inside = [error for name, error in errors.items() if name.startswith(layer + ".")]
        values += [_error(found.outputs[layer], whole.outputs[layer][:, here]), max(inside, default=0.0)]
    largest = torch.tensor(values).nan_to_num(float("inf"))
    if sp is not None and size > 1:
        largest = torch.stack([sp.broadcast(largest, rank) for rank in range(size)]).amax(0)
    of_loss, of_logits, of_gradients, of_worst, *rest = largest.tolist()
    reports = [
        LayerErrors(rest[2 * index], rest[2 * index + 1], found.sent_bytes[layer]) for index, layer in enumerate(layers)
    ]
    bound = BOUNDS[next(model.parameters()).dtype]
    return Comparison(of_loss, of_logits, of_gradients, worst, of_worst, bound), reports


class _Measured(NamedTuple):
    """outputs, sent_bytes: of layers. gradients: zero where the loss does not depend on a parameter."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]
    outputs: dict[str, Tensor]
    sent_bytes: dict[str, int]


def _measured(model: nn.Module, batch: dict[str, Any], layers: Sequence[str], sp: SequenceParallel | None) -> _Measured:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outputs: dict[str, Tensor] = {}
    sent: dict[str, int] = {}

    def sent_bytes() -> int:
        return 0 if sp is None else sp.counters.sent_bytes

    def enters(name: str) -> None:
        sent[name] = -sent_bytes()

    def leaves(name: str, output: Any) -> None:
        sent[name] += sent_bytes()
        outputs[name] = (output[0] if isinstance(output, tuple) else output).detach()

    hooks = []
    for name in layers:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda _module, _given, name=name: enters(name)))
        hooks.append(module.register_forward_hook(lambda _module, _given, output, name=name: leaves(name, output)))
    try:
        with torch.enable_grad():
            output = model(**batch, use_cache=False)
            found = torch.autograd.grad(output.loss, list(parameters.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)
    }
    return _Measured(output.loss.detach(), output.logits.detach(), gradients, outputs, sent)


def _norm(tensors: Any) -> float:
    return float(sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5)


def _error(value: Tensor, reference: Tensor) -> float:
    size = reference.double().norm().item()
    return (value.double() - reference.double()).norm().item() / (size if size > 0 else 1.0)
