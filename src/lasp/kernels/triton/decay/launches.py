"""Launches of a run, as its shapes decide: its plan, and its kernels with everything but the tensors they work on.

Made once for a shape, so that a call allocates and launches and does little else. Here is what both families share;
`scalar.launches` and `channel.launches` have the rest.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lasp.kernels.limits import FUSED_DTYPES, FUSED_MAX_DIM
from lasp.kernels.triton.common.launch import Launch, bind
from lasp.kernels.triton.decay.intervals import INTERVALS
from lasp.kernels.triton.decay.plan import CHANNEL, LaunchPlan, Tiles, keeps_states, tile
from lasp.kernels.triton.decay.segment_scan import SCAN_BLOCK, SCAN_WARPS, scan_kernel

MAX_GRID = 65535  # of a launch's second and third dims
# Base-2 log-decay of chunks that forget what was before them (`beyond_one`): less than what rounding changes.
FORGETS = {torch.bfloat16: -9.0, torch.float16: -12.0, torch.float32: -25.0}

# States [B, H_v, segments, K, V] that each segment adds, and its decays [B, H_v, segments] or [.., K] (base 2).
SegmentSums: TypeAlias = tuple[Tensor, Tensor]


class RunShape(NamedTuple):
    """The shape of a run that launches are made for, besides their plan.

    Attributes:
        q, v: shapes [B, T, H, K] and [B, T, H_v, V].
        dtype: of q, k, v.
        kind: of decay, as in `decays`.
        with_decay: whether the decay's gradient is wanted: it needs other, slower sweeps.
        scale: of the outputs.
        from_zero: whether runs are whole and start from no state.
        gate_heads: of a gate per channel, which several value heads may share; 0 for one each.
        weighs: whether tokens have weights, and heads a skip (of a gate per token, inputs of 16 bits).
    """

    q: tuple[int, ...]
    v: tuple[int, ...]
    dtype: torch.dtype
    kind: int
    with_decay: bool
    scale: float
    from_zero: bool = False
    gate_heads: int = 0
    weighs: bool = False


class DecayLaunches:
    """Launches for runs of one shape.

    Attributes:
        plan: how runs are cut.
        scale, with_decay, from_zero: as in `RunShape`.
        keeps_states: whether the states entering segments are kept for the backward pass.
        state, total_decay: shapes of a state at a run's end and of the decay of a whole run.
        states, decays: of those at the ends of segments.
        places, chunk_places, bounds: tables of packed documents (`packing.Tables`): of segments, of chunks, and of the
            documents' segments; None without documents.
        inner, inner_dtype: of the states before intervals and their gradients (`intervals`), in tiles of the sweeps, as
            they read them.
        reads: shape of what is read from states per value head.
        gradient, gradient_dtype: shape and dtype of the gradients of q and k, per value head, or of gates per channel
            per head of gates.
    """

    def __init__(self, shape: RunShape, p: LaunchPlan) -> None:
        (B, T, H, K), (H_v, V), dtype = shape.q, shape.v[2:], shape.dtype
        if dtype not in FUSED_DTYPES or max(K, V) > FUSED_MAX_DIM:
            raise ValueError(
                f"backend 'triton' takes bf16, fp16 and fp32 with K and V up to {FUSED_MAX_DIM}, got {dtype} with "
                f"K = {K}, V = {V}; use backend='torch'"
            )
        per_channel = shape.kind == CHANNEL
        pieces, programs = ("chunks", p.chunks) if per_channel else ("segments", p.segments)
        if programs > MAX_GRID:
            raise ValueError(
                f"backend 'triton' takes up to {MAX_GRID} {pieces} a rank (of {p.chunk} tokens or more, or of one "
                f"document), got {programs}; split the sequence over more ranks or use backend='torch'"
            )
        self.plan, self.scale, self.with_decay, self.from_zero = p, shape.scale, shape.with_decay, shape.from_zero
        self.keeps_states = keeps_states(p, shape.with_decay)
        self._dtype, self._heads, self._dims = dtype, B * H_v, (K, V)
        self.places: Tensor | None = None
        self.chunk_places: Tensor | None = None
        self.bounds: Tensor | None = None
        if p.tables is not None:
            self.places, self.chunk_places, self.bounds, _ = p.tables
        runs = B if self.bounds is None else len(self.bounds) - 1
        each = (K,) if per_channel else ()
        self.state, self.total_decay = (runs, H_v, K, V), (runs, H_v, *each)
        self.states, self.decays = (B, H_v, p.segments, K, V), (B, H_v, p.segments, *each)
        H_g = shape.gate_heads or H_v
        self.reads, self.gradient, self.gradient_dtype = (B, T, H_v, K), (B, T, H_g, K), partial_dtype(dtype, H, H_g)
        self._alike = (self.gradient, self.gradient_dtype) == (tuple(shape.q), dtype)
        shortest, longest = INTERVALS[dtype]
        self._intervals = {"SHORTEST": shortest, "LONGEST": longest}
        columns = (p.channel_inter_chunk if per_channel else p.scalar_keys).columns
        in_tiles = -(-K // columns) * columns * tile(V, dtype)
        self.inner = (B, H_v, -(-p.chunks // shortest) + p.segments, 2, in_tiles)
        self.inner_dtype = dtype if dtype == torch.bfloat16 else torch.float32
        # What these names mean in every kernel.
        self._known: dict[str, Any] = {
            "scale": shape.scale, "B": B, "T": T, "H": H, "H_v": H_v, "H_g": H_g, "K": K, "V": V,
            "segments": p.segments, "segment_chunks": p.segment_chunks, "chunks": p.chunks, "C": p.chunk,
            "KIND": shape.kind, "EXACT": p.exact, "FORGETS": FORGETS[dtype], "FROM_ZERO": shape.from_zero,
            "DESCRIPTORS": p.descriptors, "PACKED": p.packed, "PRECISION": p.precision, "WEIGHS": shape.weighs,
        }  # fmt: skip

    def new_gradient(self, q: Tensor) -> Tensor:
        """Memory for the gradient of q."""
        # To be like a tensor takes the host half the time of a shape.
        return torch.empty_like(q) if self._alike else q.new_empty(self.gradient, dtype=self.gradient_dtype)

    def _launch(
        self, kernel: Any, grid: tuple[int, int], warps: int, stages: int, maxnreg: int | None = None, **own: Any
    ) -> Launch:
        """A launch of `kernel` with what is its own beside what is known of the run; maxnreg: registers of a thread."""
        known = {name: self._known[name] for name in kernel.arg_names if name in self._known}
        options = {} if maxnreg is None else {"maxnreg": maxnreg}
        return bind(kernel, grid, {**known, **own}, warps=warps, stages=stages, **options)

    def _by_segment(self, kernel: Any, columns: int, tiles: Tiles, **own: Any) -> Launch:
        """A program for each segment of each head, and for each slice of the `columns` columns that it makes."""
        grid = (-(-columns // tiles.columns) * self._heads, self.plan.segments)
        return self._launch(kernel, grid, tiles.warps, tiles.stages, **own)

    @cached_property
    def scan(self) -> Launch:
        return self._scan(False)

    @cached_property
    def scan_adjoint(self) -> Launch:
        return self._scan(True)

    def _scan(self, reverse: bool) -> Launch:
        """A program for each block of a state."""
        runs, H_v, K, V = self.state
        grid = (-(-K * V // SCAN_BLOCK) * runs * H_v, 1)
        sizes = {"SIZE": K * V, "D": math.prod(self.decays[3:]), "BLOCK": SCAN_BLOCK}
        return self._launch(scan_kernel, grid, SCAN_WARPS, 1, REVERSE=reverse, **sizes)


def partial_dtype(dtype: torch.dtype, heads: int, value_heads: int) -> torch.dtype:
    """Return the dtype of dq and dk per value head: fp16 has no range for those whose heads are still to be summed."""
    return torch.float32 if dtype == torch.float16 and heads != value_heads else dtype
