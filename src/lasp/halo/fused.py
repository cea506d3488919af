"""The short convolution's fused kernels as operators of PyTorch's, which compiled graphs take as they are; and over
ranks the exchange of the rows before.

Kept for the backward pass are the inputs alone. Packed documents are a tensor, best on the host, whose numbers the
operators read when they run.
"""

# No postponed annotations: the operators' schemas are read from them.
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lasp.exchange.start import ALONE, SequenceCall, ranks_of
from lasp.halo.exchange import rows_gradients, rows_read
from lasp.halo.rows import HaloLayout, HaloPlan, tail_plan
from lasp.sequence import SequenceParallel
from lasp.sequence.sequence_parallel import broadcast_errors
from lasp.sequence.shards import document_bounds, document_digest, shard_starts


@torch.library.custom_op("lasp::convolution", mutates_args=())
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    cu_seqlens: Tensor | None,
    ranks: int,
    silu: bool,
    widths: list[int],
) -> list[Tensor]:
    """y of x [B, T, C], weight [C, W], bias [C], and the rows before x [B, W - 1, C], zero if None; in up to three
    parts [B, T, widths[n]], dense each, as those who read them want them. x may have columns beside those C, which come
    last as they are: the gradient of all is one tensor.

    cu_seqlens: of the packed documents of the whole sequence. ranks: the key of those that share it, or ALONE.
    """
    from lasp.kernels.triton.neighbours import launches

    return launches.convolve(x, weight, bias, before, _begins(cu_seqlens, ranks, x), silu, widths)


@convolution.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    cu_seqlens: Tensor | None,
    ranks: int,
    silu: bool,
    widths: list[int],
) -> list[Tensor]:
    rest = x.shape[2] - sum(widths)
    return [x.new_empty(*x.shape[:2], width) for width in ([*widths, rest] if rest else widths)]


@torch.library.custom_op("lasp::convolution_gradients", mutates_args=())
def convolution_gradients(
    d_y: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    cu_seqlens: Tensor | None,
    ranks: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the rows before; of what there is not, something."""
    from lasp.kernels.triton.neighbours import launches

    return launches.convolve_gradients(d_y, x, weight, bias, before, _begins(cu_seqlens, ranks, x), silu)


@convolution_gradients.register_fake
def _(
    d_y: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    cu_seqlens: Tensor | None,
    ranks: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, width = weight.shape
    rows = x.new_empty(x.shape[0], width - 1, channels)
    return x.new_empty(x.shape), weight.new_empty(channels, width), weight.new_empty(channels), rows


def _begins(cu_seqlens: Tensor | None, key: int, x: Tensor) -> Tensor | None:
    """Find where each token's document begins. Raises ValueError if these are not the sequence's documents."""
    if cu_seqlens is None:
        return None
    tokens, ranks = x.shape[1], None if key == ALONE else ranks_of(key)
    with broadcast_errors(ranks):  # type: ignore[arg-type]
        starts = shard_starts(ranks, tokens)  # type: ignore[arg-type]
        bounds = document_bounds(cu_seqlens, starts[-1], x.shape[0])
    start = 0 if ranks is None else starts[ranks.comm.rank]
    return _begins_of(bounds, start, tokens, x.device)


@lru_cache(maxsize=8)
def _begins_of(bounds: tuple[int, ...], start: int, tokens: int, device: torch.device) -> Tensor:
    """int32 [T]: where each token's document begins, counted from the first token here. All layers ask the same."""
    with torch.inference_mode(False):
        begins = torch.tensor(bounds)
        document = torch.searchsorted(begins, torch.arange(start, start + tokens), right=True) - 1
        return (begins[document] - start).to(device, torch.int32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.ranks, ctx.silu, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_y: list[Tensor]) -> tuple[Tensor | None, ...]:
    x, weight, bias, before, cu_seqlens = ctx.saved_tensors
    d_x, d_weight, d_bias, d_before = convolution_gradients(
        d_y, x, weight, bias, before, cu_seqlens, ctx.ranks, ctx.silu
    )
    d_bias, d_before = None if bias is None else d_bias, None if before is None else d_before
    return d_x, d_weight, d_bias, d_before, None, None, None, None


convolution.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("lasp::rows_before", mutates_args=())
def rows_before(tail: Tensor, cu_seqlens: Tensor | None, tokens: int, width: int, ranks: int) -> Tensor:
    """The rows before this rank's tokens [B, width, C], zero where their document has not begun.

    tail: [B, .., C], the last `width` of its `tokens` rows, or all if there are fewer. ranks: their key.
    """
    scheme, call = _exchanged(tail, cu_seqlens, tokens, width, ranks, "forward")
    return rows_read(tail, None, scheme, call)[0]


@rows_before.register_fake
def _(tail: Tensor, cu_seqlens: Tensor | None, tokens: int, width: int, ranks: int) -> Tensor:
    return tail.new_empty(tail.shape[0], width, tail.shape[2])


@torch.library.custom_op("lasp::rows_before_gradient", mutates_args=())
def rows_before_gradient(
    d_before: Tensor, cu_seqlens: Tensor | None, tokens: int, rows: int, width: int, ranks: int
) -> Tensor:
    """The gradient of the `rows` last rows here, which later ranks have read."""
    tail = d_before.new_empty(d_before.shape[0], rows, d_before.shape[2])
    scheme, call = _exchanged(tail, cu_seqlens, tokens, width, ranks, "backward")
    d_needed = d_before.new_zeros(d_before.shape[0], scheme.num_rows, d_before.shape[2])
    return rows_gradients(d_before, d_needed, tail.shape, None, scheme, call)[0]


@rows_before_gradient.register_fake
def _(d_before: Tensor, cu_seqlens: Tensor | None, tokens: int, rows: int, width: int, ranks: int) -> Tensor:
    return d_before.new_empty(d_before.shape[0], rows, d_before.shape[2])


def _exchanged(
    tail: Tensor, cu_seqlens: Tensor | None, tokens: int, width: int, key: int, way: str
) -> tuple[HaloPlan, SequenceCall]:
    """Plan which rows go where, and tell the other ranks."""
    ranks: SequenceParallel = ranks_of(key)  # type: ignore[assignment]
    with broadcast_errors(ranks):
        starts = shard_starts(ranks, tokens)
        bounds = document_bounds(cu_seqlens, starts[-1], tail.shape[0])
    fields = {
        "pass": way, "batch": tail.shape[0], "channels": tail.shape[2], "width": width + 1, "dtype": str(tail.dtype)
    }  # fmt: skip
    key_of = tuple(fields.values())
    call = ranks.call("compiled short_convolution", key_of, lambda: fields, document_digest(bounds))
    assert call is not None
    return tail_plan(HaloLayout(starts, bounds, width, False, False), ranks.rank, tail.device), call


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tail, cu_seqlens, ctx.tokens, ctx.width, ctx.ranks = inputs
    ctx.rows = tail.shape[1]
    ctx.save_for_backward(cu_seqlens)


def _backward_of_rows(ctx: Any, d_before: Tensor) -> tuple[Tensor | None, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    d_tail = rows_before_gradient(d_before, cu_seqlens, ctx.tokens, ctx.rows, ctx.width, ctx.ranks)
    return d_tail, None, None, None, None


rows_before.register_autograd(_backward_of_rows, setup_context=_keep_rows)
