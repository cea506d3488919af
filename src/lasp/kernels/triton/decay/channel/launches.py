"""Launches for a gate per key channel."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from lasp.kernels.triton.common.launch import Launch
from lasp.kernels.triton.decay.channel.bounded_intra_chunk import channel_bounded_intra_chunk_kernel
from lasp.kernels.triton.decay.channel.bounded_prepare import channel_bounded_prepare_kernel
from lasp.kernels.triton.decay.channel.inter_chunk import (
    channel_key_inter_chunk_kernel,
    channel_query_inter_chunk_kernel,
)
from lasp.kernels.triton.decay.channel.intra_chunk import channel_intra_chunk_kernel
from lasp.kernels.triton.decay.channel.output import channel_output_kernel, channel_value_gradient_kernel
from lasp.kernels.triton.decay.channel.prepare import channel_prepare_kernel
from lasp.kernels.triton.decay.channel.summary import channel_summary_kernel
from lasp.kernels.triton.decay.channel.through import channel_through_kernel
from lasp.kernels.triton.decay.launches import DecayLaunches, RunShape
from lasp.kernels.triton.decay.plan import LaunchPlan, Tiles, narrow, tile

# Base blocks have 2^BASE_LEVELS tokens where the dtype has the range for it, see `prepare`.
BASE_LEVELS = 4
THROUGH_CHANNELS = 32


class ChannelLaunches(DecayLaunches):
    """Launches for runs of one shape.

    Attributes:
        bounded: whether chunks whose gates are bounded have kernels of their own.
    """

    def __init__(self, shape: RunShape, p: LaunchPlan) -> None:
        super().__init__(shape, p)
        B, _, H_g, _ = self.gradient
        self._gate_heads, self._group = B * H_g, shape.v[2] // H_g
        base = base_levels(shape.dtype)
        self.bounded = base > 0
        self._levels = {"BASE": base, "LEVELS": p.chunk.bit_length() - 1, "UNBOUNDED": self.bounded}

    @cached_property
    def summary(self) -> Launch:
        return self._summary(self.plan.channels, reverse=False, prepared=False)

    @cached_property
    def prepared_summary(self) -> Launch:
        return self._summary(self.plan.prepared_channels, reverse=False, prepared=True)

    @cached_property
    def summary_adjoint(self) -> Launch:
        return self._summary(self.plan.prepared_channels, reverse=True, prepared=True)

    def _summary(self, tiles: Tiles, *, reverse: bool, prepared: bool) -> Launch:
        K, V = self._dims
        widths = {"BK": tiles.columns, "BV": tile(V, self._dtype)}
        ways = {"REVERSE": reverse, "TOTAL": not self.from_zero, "PREPARED": prepared}
        return self._by_segment(channel_summary_kernel, K, tiles, **widths, **ways)

    # The sweeps whose output has V columns.

    @cached_property
    def output(self) -> Launch:
        return self._sweep_of_values(channel_output_kernel)

    @cached_property
    def value_gradient(self) -> Launch:
        return self._sweep_of_values(channel_value_gradient_kernel)

    def _sweep_of_values(self, kernel: Any) -> Launch:
        (K, V), tiles = self._dims, self.plan.channel_values
        widths = {"BK": tile(K, self._dtype), "BV": tiles.columns}
        return self._by_segment(kernel, V, tiles, WHOLE=self.plan.gathers, **widths)

    # Those whose output has K columns.

    @cached_property
    def query_inter_chunk(self) -> Launch:
        return self._sweep_of_keys(channel_query_inter_chunk_kernel)

    @cached_property
    def key_inter_chunk(self) -> Launch:
        return self._sweep_of_keys(channel_key_inter_chunk_kernel)

    def _sweep_of_keys(self, kernel: Any) -> Launch:
        (K, V), tiles = self._dims, self.plan.channel_inter_chunk
        widths = {"BK": tiles.columns, "BV": tile(V, self._dtype), **self._intervals}
        return self._by_segment(kernel, K, tiles, WHOLE=self.plan.gathers, **widths)

    @cached_property
    def through(self) -> Launch:
        (K, V), tiles = self._dims, self.plan.channel_inter_chunk
        widths = {"CHANNELS": min(THROUGH_CHANNELS, tiles.columns), "BK": tiles.columns, "BV": tile(V, self._dtype)}
        ways = {"ROUND": self._dtype == torch.bfloat16, **self._intervals}
        return self._by_segment(channel_through_kernel, K, Tiles(widths["CHANNELS"], 1, 1), **widths, **ways)

    # Chunk by chunk.

    @cached_property
    def bounded_prepare(self) -> Launch:
        return self._prepare(channel_bounded_prepare_kernel)

    @cached_property
    def prepare(self) -> Launch:
        return self._prepare(channel_prepare_kernel, **self._levels)

    def _prepare(self, kernel: Any, **levels: int) -> Launch:
        tiles = self.plan.channel_prepare
        return self._by_chunk(kernel, 1, tiles, BK=tiles.columns, **levels)

    def _by_chunk(self, kernel: Any, slices: int, tiles: Tiles, **own: int) -> Launch:
        """A program for each chunk of each head of gates, and for each of so many slices of its channels."""
        return self._launch(kernel, (slices * self._gate_heads, self.plan.chunks), tiles.warps, tiles.stages, **own)

    @cached_property
    def bounded_intra_chunk(self) -> Launch:
        return self._intra_chunk(channel_bounded_intra_chunk_kernel, tile(self._dims[1], self._dtype))

    @cached_property
    def intra_chunk(self) -> Launch:
        # Few values at a time where a thread holds what it contracts, see `plan._sweep_tiles`.
        values = (narrow if self.plan.exact else tile)(self._dims[1], self._dtype)
        return self._intra_chunk(channel_intra_chunk_kernel, values, **self._levels)

    def _intra_chunk(self, kernel: Any, values: int, **levels: int) -> Launch:
        (K, _), tiles = self._dims, self.plan.channel_intra_chunk
        widths = {"BK": tiles.columns, "BV": values, "GROUP": self._group}
        return self._by_chunk(kernel, -(-K // tiles.columns), tiles, **widths, **levels)


def base_levels(dtype: torch.dtype) -> int:
    return BASE_LEVELS if dtype == torch.bfloat16 else 0
