"""Launches of gradients of heads that share one of q and k."""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any

import torch
import triton

from lasp.kernels.triton.common.device import takes_gluon
from lasp.kernels.triton.common.launch import Launch
from lasp.kernels.triton.decay.launches import MAX_GRID, RunShape
from lasp.kernels.triton.decay.plan import TOKEN, LaunchPlan, Tiles
from lasp.kernels.triton.decay.scalar.grouped.gates import group_gates_kernel
from lasp.kernels.triton.decay.scalar.grouped.keys import group_keys_kernel
from lasp.kernels.triton.decay.scalar.grouped.pairs import KEY_COLUMNS, SQUARES, SUMS, group_pairs_kernel
from lasp.kernels.triton.decay.scalar.grouped.states import group_states_kernel
from lasp.kernels.triton.decay.scalar.launches import GATE_SUMS_HEADS, GATE_SUMS_WARPS, ScalarLaunches
from lasp.kernels.triton.decay.scalar.sweep import BLOCK_CHUNKS

# Heads that share one of q and k, at least, and their dims.
GROUP, DIMS = 8, (64, 128)
PAIR_WARPS, PAIR_STAGES = 4, 3
KEY_WARPS, KEY_STAGES = 4, 3
STATE_STAGES = 4  # of 64 values
# Of the kernels that Hopper has of its own, and registers of a thread of pairs, of which three programs fit.
OWN_TILES, OWN_CHUNK, OWN_REGISTERS = Tiles(64, 4, 1), 64, 168
# Of a device's processors, that a program for each block is to fill.
FILLED = 0.4


class GroupedLaunches(ScalarLaunches):
    """Launches for runs of one shape.

    Attributes:
        blocks: shape of the states at the borders of blocks.
        pairs: of what pairs of tokens leave for dq and dk.
        token_sums: of sums per token and head.
        across: of <S, D> across blocks, in parts.
        scores: of each token's q . k.
        skipped: of sums of do . v.
        own: whether pairs and sweeps of values are those that Hopper has of its own.
    """

    leaves_blocks = True

    def __init__(self, shape: RunShape, p: LaunchPlan) -> None:
        super().__init__(shape, p)
        (B, _, H, K), (H_v, V) = shape.q, shape.v[2:]
        count, length = block_count(p), BLOCK_CHUNKS.value * p.chunk
        self.blocks, self.pairs = (B, H_v, count, V, K), (B, H, count, length, length)
        self._parts = K // KEY_COLUMNS.value
        self.token_sums, self.across = (SUMS.value, *self.gates), (self._parts, B, H_v, count)
        self.scores, self.skipped = (B, H, p.chunks * p.chunk), self.across[1:]
        self._key_heads = B * H
        self.own = takes_gluon() and OWN_TILES.columns == V and p.chunk == OWN_CHUNK
        self._known |= {"blocks": count}

    @cached_property
    def block_states(self) -> Launch:
        return self._states(leaves=True, reverse=False)

    @cached_property
    def summary(self) -> Launch:
        return self._states(leaves=False, reverse=False)

    @cached_property
    def summary_adjoint(self) -> Launch:
        return self._states(leaves=False, reverse=True)

    def _states(self, *, leaves: bool, reverse: bool) -> Launch:
        V, tiles = self._dims[1], self.plan.summary
        ways = {"LEAVES": leaves, "REVERSE": reverse, "TOTAL": leaves or not self.from_zero}
        if tiles.columns <= 64:
            tiles = tiles._replace(stages=STATE_STAGES)
        return self._by_segment(group_states_kernel, V, tiles, BV=tiles.columns, **ways)

    @cached_property
    def group_pairs(self) -> Launch:
        grid = (SQUARES.value * self._key_heads, self.across[3])
        if self.own:
            kernel = _own_kernel("pairs")
            return self._launch(kernel, grid, OWN_TILES.warps, OWN_TILES.stages, maxnreg=OWN_REGISTERS)
        return self._launch(group_pairs_kernel, grid, PAIR_WARPS, PAIR_STAGES)

    @cached_property
    def group_queries(self) -> Launch:
        return self._group_keys(False)

    @cached_property
    def group_keys(self) -> Launch:
        return self._group_keys(True)

    def _group_keys(self, reverse: bool) -> Launch:
        grid = (self._parts * self._key_heads, self.across[3])
        return self._launch(group_keys_kernel, grid, KEY_WARPS, KEY_STAGES, REVERSE=reverse)

    @cached_property
    def group_gates(self) -> Launch:
        _, B, H_v, count = self.across
        heads = min(GATE_SUMS_HEADS, triton.next_power_of_2(H_v))
        grid = (count, -(-H_v // heads) * B)
        parts = {"PARTS": self._parts, "COLUMN_PARTS": OWN_TILES.warps if self.own else 1}
        return self._launch(group_gates_kernel, grid, GATE_SUMS_WARPS, 1, HEADS=heads, **parts)

    @cached_property
    def output(self) -> Launch:
        return self._own_sweep(False) if self.own else super().output

    @cached_property
    def value_gradient(self) -> Launch:
        return self._own_sweep(True) if self.own else super().value_gradient

    def _own_sweep(self, reverse: bool) -> Launch:
        return self._by_segment(_own_kernel("values"), self._dims[1], OWN_TILES, REVERSE=reverse)


def _own_kernel(of: str) -> Any:
    """Return a kernel for Hopper, in a language that the interpreter, and other versions of Triton, do not know."""
    module = importlib.import_module(f"lasp.kernels.triton.decay.scalar.grouped.hopper_{of}")
    return getattr(module, f"group_hopper_{of}_kernel")


def block_count(p: LaunchPlan) -> int:
    """Return the number of blocks in a run."""
    return -(-p.chunks // BLOCK_CHUNKS.value)


def takes_groups(shape: RunShape, p: LaunchPlan, hopper: bool, processors: int) -> bool:
    """Return whether these launches take such runs, and are the faster ones.

    They have run on Hopper alone. A program sums a block over its group, which takes blocks enough for all processors.
    """
    (B, _, H, K), (H_v, V) = shape.q, shape.v[2:]
    fits = shape.dtype == torch.bfloat16 and shape.kind == TOKEN and K in DIMS and V in DIMS
    wanted = shape.with_decay and H_v >= GROUP * H and not (p.gathers or p.packed)
    enough = FILLED * processors <= B * H * block_count(p) and block_count(p) <= MAX_GRID
    return hopper and fits and wanted and enough


def scalar_launches(shape: RunShape, p: LaunchPlan, hopper: bool, processors: int) -> ScalarLaunches:
    """Return the launches for decays that all channels of a head share."""
    made: Any = GroupedLaunches if takes_groups(shape, p, hopper, processors) else ScalarLaunches
    return made(shape, p)  # type: ignore[no-any-return]
