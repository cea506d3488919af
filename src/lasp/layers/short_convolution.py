"""The short convolution before a recurrence, as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lasp.halo.functions import ACTIVATIONS, MAX_WIDTH, short_convolution_in_parts
from lasp.layers.fields import check_counts
from lasp.sequence.arguments import check_flags, check_generator

if TYPE_CHECKING:
    from lasp.sequence import SequenceParallel


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over [B, T, C]; see `lasp.short_convolution`.

    Args:
        channels: C.
        width: tokens it sees, its own included; 1 to 8.
        bias: add a learned number to each channel.
        activation: None or "silu".
    """

    def __init__(self, channels: int, width: int = 4, *, bias: bool = False, activation: str | None = "silu") -> None:
        super().__init__()
        check_counts(channels=channels, width=width)
        check_width(width, "width")
        check_flags(bias=bias)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be None or 'silu', got {activation!r}")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        if not self.weight.is_meta:
            self.reset_parameters()

    @property
    def state_dims(self) -> tuple[int, int]:
        """(C, W - 1) of the state: the last W - 1 inputs."""
        return self.weight.shape[0], self.weight.shape[1] - 1

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Uniform within W ** -0.5, as torch.nn.Conv1d starts; drawn on the generator's device (CPU), then copied."""
        check_generator(generator)
        bound = self.weight.shape[1] ** -0.5
        device = "cpu" if generator is None else generator.device
        with torch.no_grad():
            for parameter in self.parameters():
                drawn = torch.empty(parameter.shape, dtype=torch.float32, device=device)
                parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def forward(
        self,
        x: Tensor,
        *,
        state: Tensor | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        sp: SequenceParallel | None = None,
        widths: Sequence[int] | None = None,
        passing: int = 0,
    ) -> tuple[Tensor | tuple[Tensor, ...], Tensor | None]:
        """Convolve.

        Args:
            x: [B, T, C].
            state: [B, *state_dims] (packed: [N, *state_dims]) of x's dtype, the inputs before the whole sequence.
            output_state: also return the state after the whole sequence.
            cu_seqlens: of packed documents, global.
            sp: the ranks that share the sequence.
            widths: of up to three parts that y is wanted in, C in all; each is dense where kernels run.
            passing: columns of x behind those C, which come as one more part, as they are.

        Returns:
            y [B, T, C], or its parts [B, T, widths[n]], and the state, or None unless asked for.
        """
        parts, window = short_convolution_in_parts(
            x,
            self.weight.to(x.dtype),
            None if self.bias is None else self.bias.to(x.dtype),
            widths,
            passing=passing,
            activation=self.activation,
            initial_state=state,
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
            sp=sp,
        )
        return parts[0] if widths is None else parts, window


def check_width(width: int, name: str = "conv_width") -> None:
    """Raise ValueError for a width that no convolution has."""
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"{name} must be from 1 to {MAX_WIDTH}, got {width}")
