"""What the shapes of a run decide: its plan, and its kernels with everything but the tensors they work on.

Made once for a shape, so that a call allocates and launches and does little else.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from lasp.kernels.limits import FUSED_DTYPES, FUSED_MAX_DIM
from lasp.kernels.triton.common.decays import CHANNEL, HEAD, NONE, TOKEN
from lasp.kernels.triton.common.gate_sums import gate_sums_kernel
from lasp.kernels.triton.common.launch import Launch
from lasp.kernels.triton.common.packing import packed_plan
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
from lasp.kernels.triton.decay.plan import LaunchPlan, Tiles, narrow, plan, tile
from lasp.kernels.triton.decay.scalar.gate_gradient import gate_gradient_kernel
from lasp.kernels.triton.decay.scalar.intervals import leg_chunks
from lasp.kernels.triton.decay.scalar.key_gradient import key_gradient_kernel
from lasp.kernels.triton.decay.scalar.key_value_gradient import key_value_gradient_kernel
from lasp.kernels.triton.decay.scalar.output import output_kernel
from lasp.kernels.triton.decay.scalar.query_gradient import query_gradient_kernel
from lasp.kernels.triton.decay.scalar.summary import summary_kernel
from lasp.kernels.triton.decay.scalar.sweep import GATHERED, PART_ROWS, ZERO
from lasp.kernels.triton.decay.scalar.value_gradient import value_gradient_kernel
from lasp.kernels.triton.decay.segment_scan import SCAN_BLOCK, SCAN_WARPS, scan_kernel
from lasp.recurrence.documents import Documents
from lasp.recurrence.inputs import DecayInputs

GATE_BLOCK, GATE_WARPS = 8192, 8
GATE_SUMS_WARPS, GATE_SUMS_HEADS = 4, 16
MAX_GRID = 65535  # of a launch's second and third dims
INTERPRETED = (4, 1 << 20, True)
# dk and dv of segments shorter than this are faster apart, unless they are as short as those that gather.
PAIRED_CHUNKS = 24
# Base blocks have 2^BASE_LEVELS tokens where the dtype has the range for it, see channel_prepare.
BASE_LEVELS = 4
# Base-2 log-decay of a chunk that forgets what was before it: what passes it is less than what rounding changes.
FORGETS = {torch.bfloat16: -9.0, torch.float16: -12.0, torch.float32: -25.0}

_devices: dict[torch.device, tuple[int, int, bool]] = {}


class Launches:
    """What is done for runs of one shape.

    Attributes:
        plan: how they are cut.
        scale: of the outputs.
        per_token, per_channel: whether that is the kind of decay.
        bounded: whether chunks whose gates per channel are bounded have kernels of their own.
        with_decay: whether the decay's gradient is wanted: it needs other, slower sweeps.
        from_zero: whether runs are whole and start from no state.
        keeps_states: whether the states entering segments are kept for the backward pass.
        paired: whether dk and dv are made in one launch.
        state, total_decay: shapes of a state at a run's end and of the decay of a whole run.
        states, decays: of those at the ends of segments.
        gates: of each of those that a gate per token leaves for the sweeps.
        sums: of parts of q . dq, token by token: what comes of states, and what comes of chunks.
        inner: of the states at the inner borders of legs (see `legs`), or None where segments are single legs.
        gradient, gradient_dtype: shape and dtype of the gradients of q and k per value head; fp32 where heads of one
            group are still to be summed.
    """

    def __init__(
        self,
        q: tuple[int, ...],
        v: tuple[int, ...],
        dtype: torch.dtype,
        kind: int,
        p: LaunchPlan,
        with_decay: bool,
        scale: float,
        from_zero: bool = False,
    ) -> None:
        B, T, H, K = q
        H_v, V = v[2:]
        if dtype not in FUSED_DTYPES or max(K, V) > FUSED_MAX_DIM:
            raise ValueError(
                f"backend 'triton' takes bf16, fp16 and fp32 with K and V up to {FUSED_MAX_DIM}, got {dtype} with "
                f"K = {K}, V = {V}; use backend='torch'"
            )
        pieces, programs = ("chunks", p.chunks) if kind == CHANNEL.value else ("segments", p.segments)
        if programs > MAX_GRID:
            raise ValueError(
                f"backend 'triton' takes up to {MAX_GRID} {pieces} a rank (of {p.chunk} tokens or more, or of one "
                f"document), got {programs}; split the sequence over more ranks or use backend='torch'"
            )
        self.plan, self.with_decay, self.from_zero = p, with_decay, from_zero
        alike = not with_decay and H_v == H and K == V
        self.keeps_states = keeps_states(p, with_decay)
        self.paired = alike and (p.segment_chunks >= PAIRED_CHUNKS or (p.gathers and not p.descriptors))
        self._gather = (ZERO.value if p.whole else GATHERED.value) if p.gathers else 0
        self.per_token, self.per_channel = kind == TOKEN.value, kind == CHANNEL.value
        self.bounded = self.per_channel and base_levels(dtype) > 0
        self._dims, self._dtype, self._kind, self.scale = (B, T, H, H_v, K, V), dtype, kind, scale
        runs = B if p.tables is None else len(p.tables.bounds) - 1
        each = (K,) if self.per_channel else ()
        slices = -(-K // p.scalar_keys.columns)
        self.state, self.total_decay = (runs, H_v, K, V), (runs, H_v, *each)
        self.states, self.decays = (B, H_v, p.segments, K, V), (B, H_v, p.segments, *each)
        self.gates = (B, H_v, p.chunks * p.chunk)
        parts = slices if p.rows else slices * p.scalar_keys.columns // PART_ROWS.value
        self.sums = (parts, 2, *self.gates)
        leg = leg_chunks(p.exact)
        self.inner = (B, H_v, -(-p.chunks // leg), K, V) if p.segment_chunks > leg else None
        self.gradient, self.gradient_dtype = (B, T, H_v, K), partial_dtype(dtype, H, H_v)

    # A program for each segment of each head, and for each slice of the columns that it makes.

    def _by_segment(
        self, kernel: Any, columns: int, tiles: Tiles, scalars: tuple[int | float, ...], constants: tuple[Any, ...]
    ) -> Launch:
        p, (B, _, _, H_v, _, _) = self.plan, self._dims
        grid = (-(-columns // tiles.columns) * H_v * B, p.segments)
        scalars = (*scalars, p.segments, p.segment_chunks, p.chunks)
        constants = (*constants, p.descriptors, p.packed, p.precision)
        return Launch(kernel, grid, scalars, constants, tiles.warps, tiles.stages)

    def _summary(self, reverse: bool, prepared: bool = False) -> Launch:
        p, (_, T, H, H_v, K, V), total = self.plan, self._dims, not self.from_zero
        if self.per_channel:
            tiles = p.prepared_channels if prepared else p.channels
            constants = (K, V, tiles.columns, tile(V, self._dtype), p.chunk, reverse, total, prepared)
            return self._by_segment(channel_summary_kernel, K, tiles, (self.scale, T, H, H_v), constants)
        # From the end, where it can: the output's sweep starts at the other, and finds in L2 what was read last. A
        # weight then covers the rest of the segment, for which fp16 has no range; and a decay's gradient wants states
        # rounded as the sweeps round theirs.
        backwards = reverse or not (self.with_decay or self._dtype == torch.float16)
        ways = (reverse, backwards, self.with_decay, total, p.exact)
        constants = (K, V, tile(K, self._dtype), p.summary.columns, p.chunk, self._kind, *ways)
        return self._by_segment(summary_kernel, V, p.summary, (self.scale, T, H, H_v), constants)

    @cached_property
    def summary(self) -> Launch:
        return self._summary(False)

    @cached_property
    def summary_adjoint(self) -> Launch:
        return self._summary(True, prepared=self.per_channel)

    @cached_property
    def prepared_summary(self) -> Launch:
        return self._summary(False, prepared=True)

    @cached_property
    def gate_sums(self) -> Launch:
        p, (B, T, _, H_v, _, _) = self.plan, self._dims
        heads = min(GATE_SUMS_HEADS, triton.next_power_of_2(H_v))
        constants = (p.chunk, heads, p.exact, p.packed)
        return Launch(
            gate_sums_kernel, (p.chunks, -(-H_v // heads) * B), (T, H_v, p.chunks), constants, GATE_SUMS_WARPS, 1
        )

    @cached_property
    def output(self) -> Launch:
        return self._sweep_of_values(output_kernel, (self.plan.exact, self.with_decay, self._gather, self.keeps_states))

    @cached_property
    def value_gradient(self) -> Launch:
        return self._sweep_of_values(value_gradient_kernel, (self.plan.exact, self._gather))

    def _sweep_of_values(self, kernel: Any, ways: tuple[int, ...]) -> Launch:
        p, (_, T, H, H_v, K, V) = self.plan, self._dims
        constants = (K, V, tile(K, self._dtype), p.values.columns, p.chunk, self._kind, *ways)
        return self._by_segment(kernel, V, p.values, (self.scale, T, H, H_v), constants)

    @cached_property
    def query_gradient(self) -> Launch:
        return self._sweep_of_keys(query_gradient_kernel, (0 if self.keeps_states else self._gather,))

    @cached_property
    def key_gradient(self) -> Launch:
        return self._sweep_of_keys(key_gradient_kernel, (self._gather, self.keeps_states, self.from_zero))

    def _sweep_of_keys(self, kernel: Any, states: tuple[int, ...]) -> Launch:
        p, (B, T, H, H_v, K, V) = self.plan, self._dims
        tiles = p.scalar_keys if self.with_decay else p.keys
        ways = (self.with_decay, self.with_decay and p.rows, p.exact, *states)
        constants = (K, V, tiles.columns, tile(V, self._dtype), p.chunk, self._kind, *ways)
        return self._by_segment(kernel, K, tiles, (self.scale, B, T, H, H_v), constants)

    @cached_property
    def key_value_gradient(self) -> Launch:
        p, (_, T, H, H_v, K, V) = self.plan, self._dims
        constants = (K, V, tile(K, self._dtype), p.values.columns, p.chunk, self._kind, p.exact, self._gather)
        columns = 2 * p.values.columns * -(-K // p.values.columns)
        return self._by_segment(key_value_gradient_kernel, columns, p.values, (self.scale, T, H, H_v), constants)

    @cached_property
    def channel_output(self) -> Launch:
        return self._channel_values(channel_output_kernel)

    @cached_property
    def channel_value_gradient(self) -> Launch:
        return self._channel_values(channel_value_gradient_kernel)

    def _channel_values(self, kernel: Any) -> Launch:
        p, (_, T, _, H_v, K, V) = self.plan, self._dims
        constants = (K, V, tile(K, self._dtype), p.channel_values.columns, p.chunk, p.gathers)
        return self._by_segment(kernel, V, p.channel_values, (self.scale, T, H_v), constants)

    @cached_property
    def channel_query_inter_chunk(self) -> Launch:
        return self._channel_inter_chunk(channel_query_inter_chunk_kernel)

    @cached_property
    def channel_key_inter_chunk(self) -> Launch:
        return self._channel_inter_chunk(channel_key_inter_chunk_kernel, FORGETS[self._dtype], self.from_zero)

    def _channel_inter_chunk(self, kernel: Any, *others: Any) -> Launch:
        p, (_, T, _, H_v, K, V) = self.plan, self._dims
        constants = (K, V, p.channel_inter_chunk.columns, tile(V, self._dtype), p.chunk, p.gathers, *others)
        return self._by_segment(kernel, K, p.channel_inter_chunk, (T, H_v), constants)

    # Others: a program for each chunk; for each block of a state; for each segment of each head.

    @cached_property
    def channel_bounded_prepare(self) -> Launch:
        return self._prepare(channel_bounded_prepare_kernel)

    @cached_property
    def channel_prepare(self) -> Launch:
        return self._prepare(channel_prepare_kernel, *self._levels)

    def _prepare(self, kernel: Any, *others: Any) -> Launch:
        tiles, K = self.plan.channel_prepare, self._dims[4]
        return self._by_chunk(kernel, 1, tiles, (K, tiles.columns), others)

    @cached_property
    def channel_bounded_intra_chunk(self) -> Launch:
        return self._intra_chunk(channel_bounded_intra_chunk_kernel, tile(self._dims[5], self._dtype))

    @cached_property
    def channel_intra_chunk(self) -> Launch:
        # Few values at a time where a thread holds what it contracts, see `plan._sweep_tiles`.
        values = (narrow if self.plan.exact else tile)(self._dims[5], self._dtype)
        return self._intra_chunk(channel_intra_chunk_kernel, values, *self._levels)

    def _intra_chunk(self, kernel: Any, values: int, *others: Any) -> Launch:
        tiles, (K, V) = self.plan.channel_intra_chunk, self._dims[4:]
        constants = (K, V, tiles.columns, values)
        return self._by_chunk(kernel, -(-K // tiles.columns), tiles, constants, (self.from_zero, *others))

    @property
    def _levels(self) -> tuple[Any, ...]:
        return base_levels(self._dtype), self.plan.chunk.bit_length() - 1, self.bounded

    def _by_chunk(
        self, kernel: Any, slices: int, tiles: Tiles, constants: tuple[Any, ...], others: tuple[Any, ...]
    ) -> Launch:
        p, (B, T, H, H_v, _, _) = self.plan, self._dims
        constants = (*constants, p.chunk, p.packed, p.precision, *others)
        scalars = (self.scale, T, H, H_v, p.chunks)
        return Launch(kernel, (slices * H_v * B, p.chunks), scalars, constants, tiles.warps, tiles.stages)

    @cached_property
    def scan(self) -> Launch:
        return self._scan(False)

    @cached_property
    def scan_adjoint(self) -> Launch:
        return self._scan(True)

    def _scan(self, reverse: bool) -> Launch:
        p, (runs, H_v, K, V) = self.plan, self.state
        grid = (-(-K * V // SCAN_BLOCK) * runs * H_v, 1)
        constants = (K * V, V, math.prod(self.decays[3:]), SCAN_BLOCK, reverse, p.packed)
        return Launch(scan_kernel, grid, (p.segments, H_v), constants, SCAN_WARPS, 1)

    @cached_property
    def gate_gradient(self) -> Launch:
        p, (B, T, H, H_v, K, V) = self.plan, self._dims
        scalars = (self.scale, T, B * H_v, H, H_v, p.segments, p.segment_chunks, p.chunks)
        block = min(GATE_BLOCK, triton.next_power_of_2(K * V))
        tiles = (K, V, narrow(max(K, V), self._dtype), block, p.chunk, leg_chunks(p.exact), self.sums[0])
        ways = (self._kind, FORGETS[self._dtype], self._dtype == torch.bfloat16, p.exact, self.from_zero)
        constants = (*tiles, *ways, p.packed, p.precision)
        grid = (-(-p.segment_chunks // leg_chunks(p.exact)) * B * H_v, p.segments)
        return Launch(gate_gradient_kernel, grid, scalars, constants, GATE_WARPS, 1)


def keeps_states(p: LaunchPlan, with_decay: bool) -> bool:
    """Whether the states entering segments are kept for the backward pass.

    Where sweeps gather, only where a decay's gradient is wanted: the sweep of dq is slow enough then. Where runs are
    single segments there is nothing to keep.
    """
    return not p.gathers or (with_decay and not p.whole)


def base_levels(dtype: torch.dtype) -> int:
    return BASE_LEVELS if dtype == torch.bfloat16 else 0


def partial_dtype(dtype: torch.dtype, heads: int, value_heads: int) -> torch.dtype:
    """Of dq and dk per value head: fp32 where heads of one group are still to be summed."""
    return dtype if heads == value_heads else torch.float32


def kind_of(g: Tensor | None) -> int:
    """The kind of decay, as in `gates`."""
    if g is None:
        return NONE.value
    return (HEAD if g.dim() == 1 else TOKEN if g.dim() == 3 else CHANNEL).value


def per_channel(g: Tensor | None) -> bool:
    return kind_of(g) == CHANNEL.value


def device_limits(device: torch.device) -> tuple[int, int, bool]:
    """Multiprocessors of a GPU, bytes of shared memory a program may have, and whether it is of NVIDIA's Hopper
    generation; a few processors for the interpreter.

    Raises:
        ValueError: Triton cannot run there.
    """
    if device not in _devices:
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            # AMD's properties lack the second; its devices have 64 KB.
            shared = getattr(properties, "shared_memory_per_block_optin", 65536)
            hopper = torch.version.hip is None and properties.major == 9
            _devices[device] = (properties.multi_processor_count, shared, hopper)
        elif not isinstance(scan_kernel, triton.JITFunction):
            _devices[device] = INTERPRETED
        else:
            raise ValueError(
                f"backend 'triton' runs on a GPU (or on CPU under TRITON_INTERPRET=1), got tensors on {device}; "
                "use backend='torch'"
            )
    return _devices[device]


def plan_of(q: Tensor, v: Tensor, g: Tensor | None, from_zero: bool) -> LaunchPlan:
    """The launch configuration of one run of these tokens."""
    return _plan(q.shape, v.shape, q.dtype, kind_of(g), q.device, from_zero)


def _plan(
    q: tuple[int, ...], v: tuple[int, ...], dtype: torch.dtype, kind: int, device: torch.device, from_zero: bool
) -> LaunchPlan:
    B, T, H_v, V = v
    return plan(T, B * H_v, q[3], V, dtype, kind, *device_limits(device), from_zero)


def _packed_plan(
    q: tuple[int, ...],
    v: tuple[int, ...],
    dtype: torch.dtype,
    kind: int,
    device: torch.device,
    from_zero: bool,
    documents: Documents,
) -> LaunchPlan:
    """As for so many runs of the longest document's length if those gather; else as for one run."""
    tokens, longest = v[1], max((end - start for start, end in documents.spans), default=0)
    if from_zero and longest > 0:
        alike = -(-tokens // longest)
        p = _plan((alike, longest, *q[2:]), (alike, longest, *v[2:]), dtype, kind, device, True)
        if p.gathers:
            return p
    return _plan(q, v, dtype, kind, device, False)


@lru_cache(maxsize=256)
def _work(
    q: tuple[int, ...],
    v: tuple[int, ...],
    dtype: torch.dtype,
    kind: int,
    device: torch.device,
    with_decay: bool,
    scale: float,
    from_zero: bool,
) -> Launches:
    p = _plan(q, v, dtype, kind, device, from_zero)
    return Launches(q, v, dtype, kind, p, with_decay, scale, from_zero)


def work_of(x: DecayInputs, from_zero: bool = False) -> Launches:
    """The work on x.

    from_zero: x is the whole sequence and starts from no state.

    Raises:
        ValueError: the kernels do not take such tensors.
    """
    shapes = (x.q.shape, x.v.shape, x.q.dtype, kind_of(x.g), x.q.device)
    others = (x.g is not None and x.g.requires_grad, x.scale, from_zero)
    if x.documents is None:
        return _work(*shapes, *others)
    works = x.documents.layouts
    if (shapes, others) not in works:
        p = packed_plan(_packed_plan(*shapes, from_zero, x.documents), x.documents, x.q.device)
        works[shapes, others] = Launches(*shapes[:4], p, *others)
    found: Launches = works[shapes, others]
    return found
