"""Launches for decays that all channels of a head share."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import triton

from lasp.kernels.triton.common.decays import gate_sums_kernel
from lasp.kernels.triton.common.launch import Launch
from lasp.kernels.triton.decay.launches import DecayLaunches, RunShape
from lasp.kernels.triton.decay.plan import TOKEN, LaunchPlan, narrow, tile
from lasp.kernels.triton.decay.scalar.gate_gradient import gate_gradient_kernel
from lasp.kernels.triton.decay.scalar.gate_pairs import gate_pairs_kernel
from lasp.kernels.triton.decay.scalar.key_gradient import key_gradient_kernel
from lasp.kernels.triton.decay.scalar.key_value_gradient import key_value_gradient_kernel
from lasp.kernels.triton.decay.scalar.operands import GATHERED, ZERO
from lasp.kernels.triton.decay.scalar.output import output_kernel
from lasp.kernels.triton.decay.scalar.query_gradient import query_gradient_kernel
from lasp.kernels.triton.decay.scalar.summary import summary_kernel
from lasp.kernels.triton.decay.scalar.sweep import PART_ROWS
from lasp.kernels.triton.decay.scalar.value_gradient import value_gradient_kernel

GATE_BLOCK, GATE_WARPS, PAIR_WARPS = 8192, 8, 4
GATE_SUMS_WARPS, GATE_SUMS_HEADS = 4, 16
# dk and dv of segments shorter than this are faster apart, unless they are as short as those that gather.
PAIRED_CHUNKS = 24


class ScalarLaunches(DecayLaunches):
    """Launches for runs of one shape.

    Attributes:
        per_token: whether there is a gate per token.
        num_gates: sums that such a gate leaves for the sweeps: see `LaunchPlan.num_gates`.
        paired: whether dk and dv are made in one launch.
        gates: shape of each of those that a gate per token leaves for the sweeps.
        sums: of parts of q . dq, token by token: what comes of states, and what comes of chunks.
        skipped: of sums of do . v, where tokens have weights.
        leaves_blocks: whether the sweep of dv leaves states for `grouped`, which needs no key that is weighted.
    """

    leaves_blocks = False

    def __init__(self, shape: RunShape, p: LaunchPlan) -> None:
        super().__init__(shape, p)
        (B, _, H, K), (H_v, V) = shape.q, shape.v[2:]
        self.per_token, self.num_gates = shape.kind == TOKEN, p.num_gates(shape.weighs)
        alike = not shape.with_decay and H_v == H and K == V
        self.paired = alike and (p.segment_chunks >= PAIRED_CHUNKS or (p.gathers and not p.descriptors))
        self._gather = (ZERO.value if p.whole else GATHERED.value) if p.gathers else 0
        self.gates = (B, H_v, p.chunks * p.chunk)
        slices = -(-K // p.scalar_keys.columns)
        parts = slices if p.rows else slices * p.scalar_keys.columns // PART_ROWS.value
        self.sums = (parts, 2, *self.gates)
        self.weighs, self.skipped = shape.weighs, (B, H_v, p.segments)

    @cached_property
    def gate_sums(self) -> Launch:
        H_v = self.gates[1]
        heads = min(GATE_SUMS_HEADS, triton.next_power_of_2(H_v))
        grid = (self.plan.chunks, -(-H_v // heads) * self.gates[0])
        return self._launch(gate_sums_kernel, grid, GATE_SUMS_WARPS, 1, HEADS=heads)

    @cached_property
    def summary(self) -> Launch:
        return self._summary(False)

    @cached_property
    def summary_adjoint(self) -> Launch:
        return self._summary(True)

    def _summary(self, reverse: bool) -> Launch:
        K, V = self._dims
        # From the end, where it can: the output's sweep starts at the other, and finds in L2 what was read last. A
        # weight then covers the rest of the segment, for which fp16 has no range; and a decay's gradient wants states
        # rounded as the sweeps round theirs.
        backwards = reverse or not (self.with_decay or self._dtype == torch.float16)
        return self._by_segment(
            summary_kernel,
            V,
            self.plan.summary,
            BK=tile(K, self._dtype),
            BV=self.plan.summary.columns,
            REVERSE=reverse,
            BACKWARDS=backwards,
            WEIGH_K=self.with_decay,
            TOTAL=not self.from_zero,
        )

    # The sweeps whose output has V columns.

    @cached_property
    def output(self) -> Launch:
        return self._sweep_of_values(
            output_kernel,
            LEARNED=self.with_decay and not self.leaves_blocks,
            GATHER=self._gather,
            KEEPS=self.keeps_states,
        )

    @cached_property
    def value_gradient(self) -> Launch:
        return self._sweep_of_values(value_gradient_kernel, GATHER=self._gather, BLOCKS=self.leaves_blocks)

    def _sweep_of_values(self, kernel: Any, **ways: int) -> Launch:
        (K, V), tiles = self._dims, self.plan.values
        return self._by_segment(kernel, V, tiles, BK=tile(K, self._dtype), BV=tiles.columns, **ways)

    @cached_property
    def key_value_gradient(self) -> Launch:
        (K, _), tiles = self._dims, self.plan.values
        columns = 2 * tiles.columns * -(-K // tiles.columns)
        widths = {"BA": tile(K, self._dtype), "BC": tiles.columns}
        return self._by_segment(key_value_gradient_kernel, columns, tiles, GATHER=self._gather, **widths)

    # Those whose output has K columns.

    @cached_property
    def query_gradient(self) -> Launch:
        return self._sweep_of_keys(query_gradient_kernel, GATHER=0 if self.keeps_states else self._gather)

    @cached_property
    def key_gradient(self) -> Launch:
        return self._sweep_of_keys(key_gradient_kernel, GATHER=self._gather)

    def _sweep_of_keys(self, kernel: Any, **states: int) -> Launch:
        (K, V), p = self._dims, self.plan
        tiles = p.scalar_keys if self.with_decay else p.keys
        ways = {"SUMS": self.with_decay, "ROWS": self.with_decay and p.rows, **self._intervals}
        return self._by_segment(kernel, K, tiles, BK=tiles.columns, BV=tile(V, self._dtype), **ways, **states)

    @cached_property
    def gate_pairs(self) -> Launch:
        """A program for each chunk of each head."""
        (K, V), p = self._dims, self.plan
        columns = narrow(max(K, V), self._dtype)
        all_keys = self._dtype == torch.bfloat16 and tile(K, self._dtype) == 128
        return self._launch(
            gate_pairs_kernel,
            (self._heads * p.chunks, 1),
            PAIR_WARPS,
            1,
            rows=self._heads,
            BK=128 if all_keys else columns,
            BV=columns,
        )

    @cached_property
    def gate_gradient(self) -> Launch:
        """A program for each of the longest intervals of each head."""
        (K, V), p = self._dims, self.plan
        return self._launch(
            gate_gradient_kernel,
            (-(-p.segment_chunks // self._intervals["LONGEST"]) * self._heads, p.segments),
            GATE_WARPS,
            1,
            rows=self._heads,
            PARTS=self.sums[0],
            SIZE=self.inner[-1],
            BLOCK=min(GATE_BLOCK, triton.next_power_of_2(K * V)),
            ROUND=self._dtype == torch.bfloat16,
            **self._intervals,
        )
