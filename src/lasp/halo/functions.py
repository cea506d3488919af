"""The public functions over halos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.exchange.start import ALONE, SequenceCall
from lasp.halo.exchange import read_rows
from lasp.halo.fused import convolution, rows_before
from lasp.halo.rows import BoundaryOverride, HaloLayout, plan
from lasp.kernels.select import has_fused_kernels
from lasp.recurrence.untraced import untraced, untraced_over_ranks
from lasp.sequence import SequenceParallel
from lasp.sequence.arguments import as_operand, check_flags, check_floats, check_tensor
from lasp.sequence.sequence_parallel import broadcast_errors, check_shard
from lasp.sequence.shards import document_bounds, document_digest, shard_starts

ACTIVATIONS = (None, "silu")
MAX_WIDTH = 8
FUSED_WIDTH = 4  # up to which there are fused kernels


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    sp: SequenceParallel | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution: y_t = activation(bias + sum_j weight[:, W - 1 - j] x_{t - j}), j = 0 .. W - 1.

    With `sp`, T is this rank's part of a longer sequence, and the result is as if one device had computed all of it:
    each rank gets the W - 1 rows before its first token from its neighbour, or from several where shards are shorter.

    Args:
        x: [B, T, C], fp64, fp32, bf16 or fp16.
        weight: [C, W] of the same dtype, W from 1 to 8; the last column is for the token itself.
        bias: [C] of the same dtype.
        activation: None or "silu".
        initial_state: [B, C, W - 1] (packed: [N, C, W - 1]) of the same dtype, the inputs before the first token of
            the global sequence (of each document), oldest first, the same on every rank of `sp`; zeros if None. Its
            gradient is whole on the group's first rank and zero on the others.
        output_final_state: also return the last W - 1 inputs, in the form of initial_state, on every rank. The
            gradients that the ranks give for it are summed.
        cu_seqlens: integers [N + 1], the same on every rank: where the packed documents of the whole sequence (of
            all ranks together) start, and its length; B must be 1. No document sees another.
        sp: the ranks that share the sequence. All of them must call, with the same arguments but for the tokens.

    Returns:
        y [B, T, C] and the final state or None.

    Raises:
        ValueError: an argument does not fit.
        ExchangeError: the ranks of `sp` disagree, or one does not answer in time.
    """
    (y,), final = short_convolution_in_parts(
        x,
        weight,
        bias,
        None,
        activation=activation,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        sp=sp,
    )
    return y, final


def short_convolution_in_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Sequence[int] | None,
    *,
    passing: int = 0,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    sp: SequenceParallel | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """`short_convolution`, whose y comes in up to three parts [B, T, widths[n]]; widths: [C] if None.

    Kernels write each apart, dense as a recurrence wants it, and read the parts' gradients where they are.

    passing: the last columns of x that are not convolved, and come as a part of their own, the last.
    """
    with broadcast_errors(sp):
        _check_x(x)
        _check_weight(x[..., : x.shape[2] - passing], weight, bias)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be None or 'silu', got {activation!r}")
        check_flags(output_final_state=output_final_state)
        check_shard(sp, x.shape[1])
    channels = x.shape[2] - passing
    over_ranks = sp is not None and sp.size > 1
    if torch.compiler.is_compiling() and (over_ranks or cu_seqlens is not None):
        if _is_fused(x, weight) and initial_state is None and not output_final_state:
            return _in_graph(x, weight, bias, widths or [channels], activation, cu_seqlens, sp), None
        run = _outside_of_graphs if over_ranks else _convolved
    else:
        run = _convolved
    return run(x, weight, bias, widths or [channels], activation, initial_state, output_final_state, cu_seqlens, sp)


def _is_fused(x: Tensor, weight: Tensor) -> bool:
    return weight.shape[1] <= FUSED_WIDTH and has_fused_kernels(x.device, x.dtype)


def _in_graph(
    whole: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    activation: str | None,
    cu_seqlens: Tensor | Sequence[int] | None,
    sp: SequenceParallel | None,
) -> tuple[Tensor, ...]:
    """Convolve within a compiled graph, by operators that look into the documents when they run."""
    width, before = weight.shape[1] - 1, None
    bounds = as_operand(cu_seqlens)
    if sp is not None and sp.size > 1 and width:
        tail = whole[:, -width:, : weight.shape[0]]
        before = rows_before(tail, bounds, whole.shape[1], width, sp.key)
    return tuple(convolution(whole, weight, bias, before, bounds, _key(sp), activation == "silu", list(sizes)))


def _key(sp: SequenceParallel | None) -> int:
    return ALONE if sp is None or sp.size == 1 else sp.key


def _convolved(
    whole: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    activation: str | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | Sequence[int] | None,
    sp: SequenceParallel | None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    x, width = whole[..., : weight.shape[0]], weight.shape[1] - 1
    with broadcast_errors(sp):
        layout = _layout(x, width, initial_state, output_final_state, cu_seqlens, sp)
    gradients = tuple(t is not None and t.requires_grad for t in (x, weight, bias, initial_state))
    call = _called(sp, "short_convolution", x, initial_state, layout, gradients, (bias is not None, activation))
    read = _read(x, layout, initial_state, sp, call)
    with torch.autocast(x.device.type, enabled=False):  # the arguments' dtype is the one asked for
        is_fused = _is_fused(x, weight)
        bounds = torch.tensor(layout.bounds) if is_fused and len(layout.bounds) > 2 and initial_state is None else None
        if bounds is not None:  # kernels see to it
            read = read._replace(override=None)
        fixed = None
        if read.override is not None:
            rows = [read.back(x, j) for j in range(width, -1, -1)]
            fixed = _activated(_convolve(rows, weight, bias), activation)
        if is_fused:
            parts = convolution(whole, weight, bias, read.before, bounds, _key(sp), activation == "silu", list(sizes))
        else:
            parts = [*_activated(_convolve_all(read.extended(x), weight, bias), activation).split(list(sizes), 2)]
            parts += [whole[..., x.shape[2] :]] if whole.shape[2] > x.shape[2] else []
        if read.override is not None and fixed is not None:
            tokens = read.override.tokens
            for n, own in enumerate(fixed.split(list(sizes), 2)):
                parts[n] = parts[n].index_copy(1, tokens, own)
        return tuple(parts), read.final


_outside_of_graphs = untraced(_convolved, "short_convolution over several ranks without fused kernels, or with states,")


@untraced_over_ranks
def token_shift(
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    sp: SequenceParallel | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The row of the token before: y_t = x_{t-1}, zeros (or the initial state) at a document's start, as in RWKV.

    Args:
        x: [B, T, C], fp64, fp32, bf16 or fp16.
        initial_state: [B, C] (packed: [N, C]), the row before the first token of the sequence (of each document).
        others: as in `short_convolution`; the final state is the last token's row, in the form of initial_state.

    Returns:
        y [B, T, C] and the final state or None.

    Raises:
        ValueError: an argument does not fit.
        ExchangeError: the ranks of `sp` disagree, or one does not answer in time.
    """
    with broadcast_errors(sp):
        _check_x(x)
        if initial_state is not None:
            check_tensor("initial_state", initial_state, "[B or N, C]")
            if initial_state.dim() != 2:
                raise ValueError(f"initial_state must be [B or N, C], got {tuple(initial_state.shape)}")
            initial_state = initial_state[..., None]
        check_flags(output_final_state=output_final_state)
        check_shard(sp, x.shape[1])
        layout = _layout(x, 1, initial_state, output_final_state, cu_seqlens, sp)
    gradients = tuple(t is not None and t.requires_grad for t in (x, initial_state))
    call = _called(sp, "token_shift", x, initial_state, layout, gradients, ())
    read = _read(x, layout, initial_state, sp, call)
    y = read.extended(x)[:, :-1]
    if read.override is not None:
        y = y.index_copy(1, read.override.tokens, read.back(x, 1))
    return y, None if read.final is None else read.final[..., 0]


class _ReadRows(NamedTuple):
    """Rows that the tokens here read beside one another.

    Attributes:
        before: [B, w, C], those before the first token, zero if None; but for the tokens of `override`.
        needed: [B, M + 1, C], those that the plan needs, and zeros.
    """

    width: int
    before: Tensor | None
    needed: Tensor
    override: BoundaryOverride | None
    final: Tensor | None

    def extended(self, x: Tensor) -> Tensor:
        """[B, w + T, C]: x after what stands before it."""
        before = x.new_zeros(x.shape[0], self.width, x.shape[2]) if self.before is None else self.before
        return torch.cat((before, x), 1)

    def back(self, x: Tensor, tokens: int) -> Tensor:
        """[B, A, C]: what the tokens of `override` read so many tokens back."""
        assert self.override is not None
        # Selected, not multiplied by zero: another document may hold NaN.
        near = x.index_select(1, self.override.near[tokens])
        far = self.needed.index_select(1, self.override.far[tokens])
        return torch.where(self.override.is_near[tokens][:, None], near, far)


def _read(
    x: Tensor, layout: HaloLayout, initial_state: Tensor | None, sp: SequenceParallel | None, call: SequenceCall | None
) -> _ReadRows:
    """Exchange rows, where there is another rank or another document."""
    if len(layout.bounds) == 2 and (sp is None or sp.size == 1):
        return _read_whole(x, layout, initial_state)
    return _read_planned(x, layout, initial_state, 0 if sp is None else sp.rank, call)


@untraced
def _read_planned(
    x: Tensor, layout: HaloLayout, initial_state: Tensor | None, rank: int, call: SequenceCall | None
) -> _ReadRows:
    """Read them by a plan, which is made of numbers that the compiler has not."""
    states = (x.shape[0] if len(layout.bounds) == 2 else len(layout.bounds) - 1, layout.width)
    initial = None
    if initial_state is not None:  # [B, C, w] -> [B, w, C], packed [N, C, w] -> [1, N * w, C]
        documents = len(layout.bounds) - 1
        initial = initial_state.transpose(1, 2).reshape(x.shape[0], documents * layout.width, x.shape[2])
    scheme = plan(layout, rank, x.device)
    before, needed = read_rows(x, initial, scheme, call)
    needed = F.pad(needed, (0, 0, 0, 1))  # and a row of zeros
    final = None
    if scheme.final is not None:
        final = needed.index_select(1, scheme.final).reshape(*states, x.shape[2]).transpose(1, 2)
    return _ReadRows(layout.width, before, needed, scheme.override, final)


def _read_whole(x: Tensor, layout: HaloLayout, initial_state: Tensor | None) -> _ReadRows:
    """Rows that whole sequences read which are all here: no plan is needed, which the compiler could not follow."""
    read = _ReadRows(layout.width, None if initial_state is None else initial_state.mT, x[:, :0], None, None)
    if not layout.final:
        return read
    # Of the last rows alone, where they are all here.
    last = x[:, x.shape[1] - layout.width :] if x.shape[1] >= layout.width else read.extended(x)[:, x.shape[1] :]
    return read._replace(final=last.transpose(1, 2))


def _activated(y: Tensor, activation: str | None) -> Tensor:
    return F.silu(y) if activation == "silu" else y


def _convolve(rows: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows: W of [B, T, C], what each token reads, itself last; weight [C, W] -> [B, T, C].

    Tap by tap: conv1d's gradients of weight and bias are plain sums over tokens, which lose digits of fp32.
    """
    wide = _wide(weight.dtype)
    y = weight.new_zeros((), dtype=wide) if bias is None else bias.to(wide)
    for row, tap in zip(rows, weight.to(wide).unbind(1), strict=True):
        y = torch.addcmul(y, row.to(wide), tap)
    return y.to(weight.dtype)


# Tokens over which conv1d's plain sums keep fp32's digits; 16 bits' own rounding is more than what they lose.
SUMMED_PLAINLY = 4096


def _convolve_all(extended: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """extended [B, W - 1 + T, C], weight [C, W] -> [B, T, C]."""
    channels, taps = weight.shape
    tokens = extended.shape[1] - taps + 1
    if tokens > 0 and (extended.dtype.itemsize < 4 or tokens <= SUMMED_PLAINLY):
        return F.conv1d(extended.transpose(1, 2), weight[:, None], bias, groups=channels).transpose(1, 2)
    return _convolve([extended[:, j : j + tokens] for j in range(taps)], weight, bias)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of `dtype` are taken in."""
    return torch.promote_types(dtype, torch.float32)


def _layout(
    x: Tensor,
    width: int,
    initial_state: Tensor | None,
    want_final: bool,
    cu_seqlens: Tensor | Sequence[int] | None,
    sp: SequenceParallel | None,
) -> HaloLayout:
    starts = shard_starts(sp, x.shape[1])
    bounds = document_bounds(cu_seqlens, starts[-1], x.shape[0])
    if initial_state is not None:
        check_tensor("initial_state", initial_state, "[B or N, C, W - 1]")
        shape = (x.shape[0] if cu_seqlens is None else len(bounds) - 1, x.shape[2], width)
        if tuple(initial_state.shape) != shape or initial_state.dtype != x.dtype or initial_state.device != x.device:
            raise ValueError(
                f"initial_state must be [B or documents, C, rows before the first token] {shape}, {x.dtype}, on "
                f"{x.device}; got {tuple(initial_state.shape)}, {initial_state.dtype}, on {initial_state.device}"
            )
    return HaloLayout(starts, bounds, width, initial_state is not None, want_final)


def _called(
    sp: SequenceParallel | None,
    operator: str,
    x: Tensor,
    initial_state: Tensor | None,
    layout: HaloLayout,
    gradients: Sequence[bool],
    options: tuple[object, ...],
) -> SequenceCall | None:
    """Tell the other ranks what is about to be computed."""
    if sp is None:
        return None
    requires_grad = tuple(gradients) if torch.is_grad_enabled() else None
    key = (x.shape, x.dtype, layout.width, layout.initial, layout.final, requires_grad, options)

    def fields() -> dict[str, object]:
        return {
            "batch": x.shape[0],
            "tokens (pass lengths= to SequenceParallel for unequal shards)": (
                x.shape[1] if sp.lengths is None else "by lengths"
            ),
            "channels": x.shape[2],
            "dtype": str(x.dtype),
            "width": layout.width + 1,
            "initial_state": layout.initial,
            "output_final_state": layout.final,
            "requires_grad": requires_grad,
            "options": options,
        }

    return sp.call(operator, key, fields, document_digest(layout.bounds), (x, initial_state))


def _check_x(x: Tensor) -> None:
    check_floats("x", x, "[B, T, C]", 3)
    if x.shape[2] == 0:
        raise ValueError(f"x must be [B, T, C] with at least one channel, got {tuple(x.shape)}")


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("weight", weight, "[C, W]")
    if bias is not None:
        check_tensor("bias", bias, "[C]")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"weight must be [C, W] with x's C = {x.shape[2]} and W from 1 to {MAX_WIDTH}, got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (x.shape[2],):
        raise ValueError(f"bias must be [C] = [{x.shape[2]}], got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name} must have x's dtype {x.dtype} and device {x.device}, got {tensor.dtype} on {tensor.device}"
            )
