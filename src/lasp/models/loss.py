"""Cross entropy over a large vocabulary without ever holding all logits.

The loss comes last, so what its gradients will be multiplied with is one number. They are therefore taken while a chunk
of logits is there, in the forward pass: logits are computed once, weight gradients are added up in one buffer by the
matrix product itself, and the backward pass only scales. Fused linear cross entropies of kernel libraries do the same;
docs/results/loss.md says what they do not cover and this must.
"""

# No postponed annotations: the operator's schema is read from them.
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.select import has_fused_kernels
from lasp.recurrence.derivatives import first_derivatives
from lasp.sequence.arguments import check_floats, check_ids, whole

IGNORED_LABEL = -100

# Logits alive at once. A GPU takes more: every chunk reads and writes the whole gradient of the weight, which 2048
# tokens' products hide.
_CHUNK_LOGITS, _CHUNK_LOGITS_GPU, _CHUNK_LOGITS_FUSED = 1 << 24, 1 << 27, 1 << 28
_FEWEST_TOKENS, _FEWEST_TOKENS_GPU = 128, 2048


def default_chunk_tokens(vocab: int, *, on_gpu: bool, fused: bool = False) -> int:
    """Tokens whose logits are computed at once, a power of two: of other numbers, matrix products are slower.

    fused: by a kernel, on a GPU: nothing in fp32 stands beside them.
    """
    logits, fewest = (_CHUNK_LOGITS_GPU, _FEWEST_TOKENS_GPU) if on_gpu else (_CHUNK_LOGITS, _FEWEST_TOKENS)
    return max(fewest, 1 << ((_CHUNK_LOGITS_FUSED if fused else logits) // vocab).bit_length() >> 1)


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[label], in nats.

    Matrix products are in autocast's dtype where it is on; log softmax, the loss and the sum over tokens of the
    weight's gradient in fp32 (fp64 for fp64 hidden). Without gradients wanted, none is computed.

    Memory in the forward pass: the logits of a chunk in the products' dtype, and without fused kernels in fp32 (512 MiB
    on a GPU in bf16, 128 MiB on a CPU in fp32; more where 2048 or 128 tokens have more), and under autocast a copy of
    the weight. From there
    to the backward pass: the two gradients, hidden's in the products' dtype, the weight's in fp32.

    Args:
        hidden: [N, D].
        weight: [vocab, D].
        labels: int64 [N]; -100 is ignored.
        chunk_tokens: tokens per chunk; see `default_chunk_tokens`.

    Returns:
        A scalar in fp32 (fp64 for fp64 hidden), connected to the graph also where there is no token.

    Raises:
        ValueError: shapes or dtypes do not fit, or hidden and weight have different dtypes and no autocast makes them
            one; on a CPU also where a label is outside the vocabulary.
        RuntimeError: a second backward pass (with weight's gradient), or one that creates a graph.
    """
    _check(hidden, weight, labels)
    if _product_dtype(hidden) != _product_dtype(weight):
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    if chunk_tokens is None:
        fused = has_fused_kernels(hidden.device, _product_dtype(hidden))
        chunk_tokens = default_chunk_tokens(weight.shape[0], on_gpu=hidden.is_cuda, fused=fused)
    chunk_tokens = whole("chunk_tokens", chunk_tokens, 1)
    needed = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    if not any(needed):
        return _over_chunks(hidden, weight, labels, chunk_tokens, None, None)
    loss: Tensor = _CrossEntropySum.apply(hidden, weight, labels, chunk_tokens)
    return loss


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    check_floats("hidden", hidden, "[N, D]", 2)
    check_floats("weight", weight, "[vocab, D]", 2)
    if weight.shape[1] != hidden.shape[1] or not len(weight):
        raise ValueError(f"weight must be [vocab, D] with hidden's D = {hidden.shape[1]}, got {tuple(weight.shape)}")
    check_ids("labels", labels, len(weight), "[N]", ignored=IGNORED_LABEL)
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be [N] = [{len(hidden)}], got {tuple(labels.shape)}")


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.empty_like(hidden, dtype=_product_dtype(hidden), memory_format=torch.contiguous_format)
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=_wide(hidden))
        loss = _over_chunks(hidden, weight, labels, chunk_tokens, d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    @first_derivatives("the loss")
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden.to(ctx.dtypes[0]) * d_loss
        if d_weight is not None:
            # In place, since it is large. PyTorch sees that a saved tensor changed and refuses a second backward pass.
            d_weight = d_weight.mul_(d_loss).to(ctx.dtypes[1])
        return d_hidden, d_weight, None, None


def _over_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, d_hidden: Tensor | None, d_weight: Tensor | None
) -> Tensor:
    """The loss. Where there is a place for a gradient, hidden's [N, D] is written and the weight's [vocab, D] added."""
    weight = weight.to(_product_dtype(hidden))
    loss = torch.zeros((), device=hidden.device, dtype=_wide(hidden))
    for first in range(0, hidden.shape[0], chunk_tokens):
        chunk = slice(first, first + chunk_tokens)
        d_chunk = None if d_hidden is None else d_hidden[chunk]
        # A function of its own, whose logits are gone before the next chunk's are made.
        loss += _chunk(hidden[chunk], weight, labels[chunk], d_chunk, d_weight)
    return loss


def _chunk(hidden: Tensor, weight: Tensor, labels: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None) -> Tensor:
    ignored = (labels == IGNORED_LABEL)[:, None]
    # Zeros add nothing to the weight's gradient. To clear rows of logits would be another pass over all of them.
    x = hidden.to(weight.dtype).masked_fill(ignored, 0)
    logits = x @ weight.mT
    wanted = d_hidden is not None or d_weight is not None
    if has_fused_kernels(logits.device, logits.dtype):
        loss = _fused_cross_entropy(logits, labels, wanted)
    else:
        loss = _cross_entropy(logits, labels, wanted, _wide(hidden))
    if d_hidden is not None:
        torch.mm(logits, weight, out=d_hidden).masked_fill_(ignored, 0)
    if d_weight is not None:
        _add_product(d_weight, logits.mT, x)
    return loss


def _cross_entropy(logits: Tensor, labels: Tensor, wanted: bool, dtype: torch.dtype) -> Tensor:
    """The sum over rows, in `dtype`; if wanted, the gradient of logits [N, vocab] takes their place."""
    log_p = logits.log_softmax(-1, dtype=dtype)
    loss = F.nll_loss(log_p, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    if wanted:
        # softmax - 1 at the label; there from the logarithm, or p - 1 is rounded to nothing where p is nearly 1.
        label = labels.clamp(min=0)[:, None]
        at_label = log_p.gather(1, label).expm1().to(logits.dtype)
        torch.exp(log_p, out=logits).scatter_(1, label, at_label)
    return loss


@torch.library.custom_op("lasp::cross_entropy", mutates_args=("logits",))
def _fused_cross_entropy(logits: Tensor, labels: Tensor, wanted: bool) -> Tensor:
    """`_cross_entropy` in fp32, by a kernel that reads logits once and holds nothing beside them."""
    from lasp.kernels.triton.loss import launches

    return launches.cross_entropy(logits, labels, IGNORED_LABEL, gradient=wanted).sum()


@_fused_cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, wanted: bool) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, added up in the dtype of `total`, fp32 or wider."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        # With out=, since PyTorch's counter of operations does not know the method in place.
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which it enters a matrix product: autocast's, which leaves fp64 alone."""
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype
