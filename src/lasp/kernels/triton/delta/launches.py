"""Launches of a run, as its shapes decide: its plan, and its kernels with everything but the tensors they work on.

Made once for a shape, so that a call allocates and launches and does little else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property, lru_cache, wraps
from typing import Any

import torch
import triton

from lasp.kernels.limits import FUSED_DTYPES, FUSED_MAX_DIM
from lasp.kernels.triton.common.decays import CHANNEL, TOKEN, gate_sums_kernel
from lasp.kernels.triton.common.device import device_limits, takes_gluon
from lasp.kernels.triton.common.launch import Launch, bind
from lasp.kernels.triton.common.packing import DESCRIPTOR_CHUNKS, packed_changes
from lasp.kernels.triton.decay.channel.launches import base_levels
from lasp.kernels.triton.decay.launches import MAX_GRID
from lasp.kernels.triton.decay.plan import kind_of
from lasp.kernels.triton.decay.scalar.launches import GATE_SUMS_HEADS, GATE_SUMS_WARPS
from lasp.kernels.triton.delta.channel_gradients import delta_channel_gradients_kernel
from lasp.kernels.triton.delta.channel_operands import delta_channel_operands_kernel
from lasp.kernels.triton.delta.channel_scores import delta_channel_scores_kernel
from lasp.kernels.triton.delta.gradients import delta_gradients_kernel
from lasp.kernels.triton.delta.norms import key_gradient_sum_kernel, norms_kernel
from lasp.kernels.triton.delta.output import delta_output_kernel
from lasp.kernels.triton.delta.plan import OWN_COLUMNS, DeltaPlan, Tiles, delta_plan, tile
from lasp.kernels.triton.delta.reverse import delta_reverse_kernel
from lasp.kernels.triton.delta.segment_scan import delta_scan_kernel
from lasp.kernels.triton.delta.solve import solve_kernel
from lasp.kernels.triton.delta.states import delta_states_kernel
from lasp.kernels.triton.delta.summary import delta_summary_kernel
from lasp.recurrence.inputs import NORM_EPS, DeltaInputs

MARKED_CHUNKS = 16  # that a program looks at, of a kernel for those that are marked
WIDE_WARPS = 8  # of kernels that hold whole rows of a chunk


def _once(make: Callable[..., Launch]) -> Callable[..., Launch]:
    """A method's launches, each made when it is first asked for."""

    @wraps(make)
    def found(self: DeltaLaunches, *arguments: Any, **ways: Any) -> Launch:
        key = (make.__name__, arguments, *ways.values())
        if key not in self.made:
            self.made[key] = make(self, *arguments, **ways)
        return self.made[key]

    return found


class DeltaLaunches:
    """Launches for runs of one shape.

    Attributes:
        plan: how they are cut.
        scale: of the outputs.
        dtype: of the inputs.
        operand: the dtype that the kernels take for inputs of `dtype`: that, or fp32 for fp16, which lacks the range.
        kind, per_channel: of decay, as in `gates`; whether that is a gate per channel.
        bounded: whether chunks whose gates per channel are bounded have kernels of their own.
        normalize: whether queries and keys are divided by their lengths.
        with_gate: whether the gradient of the gate is wanted.
        from_zero: whether runs are whole and start from no state.
        erases: whether tokens read with a key of their own.
        own: whether sweeps are those that Hopper has of its own.
        joined: whether states and gradients are made in one sweep.
        placed: of a gate per channel, whether S and D of chunks lie in the place of dq, dk and dg.
        state: shape of a state at a run's end. states, moves: of what segments add, and of their transitions.
        bounds_chunks: whether it is known what passes chunks at most. bounds: of that.
        slots: of a number for each token of each chunk. norms: likewise for each head of keys.
        tiles: of the matrices between the tokens of each chunk.
        state_chunks: of S at the starts of chunks, or D at their ends. tails: of those of runs' last chunks.
        gates: of the parts of dg. totals: of the decays of chunks.
        operands: of keys that have their decays.
        gradient, gradient_dtype: of dq and dk per value head.
    """

    def __init__(
        self,
        q: tuple[int, ...],
        v: tuple[int, ...],
        dtype: torch.dtype,
        kind: int,
        p: DeltaPlan,
        with_gate: bool,
        normalize: bool,
        scale: float,
        from_zero: bool,
        erases: bool,
    ) -> None:
        (B, T, H, K), (H_v, V) = q, v[2:]
        if dtype not in FUSED_DTYPES or V > FUSED_MAX_DIM:
            raise ValueError(
                f"backend 'triton' takes bf16, fp16 and fp32 with V up to {FUSED_MAX_DIM} here, got {dtype} with V = "
                f"{V}; use backend='torch'"
            )
        if max(p.segments, B * H_v) > MAX_GRID:
            raise ValueError(
                f"backend 'triton' takes up to {MAX_GRID} segments a rank (of {p.chunk} tokens or more, or of one "
                f"document) and as many heads, got {p.segments} and {B * H_v}; split the sequence over more ranks or "
                "use backend='torch'"
            )
        self.plan, self.scale, self.kind, self.normalize, self.dtype = p, scale, kind, normalize, dtype
        self.with_gate, self.from_zero, self.erases = with_gate, from_zero, erases
        self.own = p.own and not erases and takes_gluon()
        self.joined = self.own and K == V == OWN_COLUMNS and kind != CHANNEL.value
        # Then a state's columns are as many as two chunks' tokens, and what a program has of them as one's.
        self.placed = K == V == 2 * p.chunk == 2 * p.channel.columns and kind == CHANNEL.value and with_gate
        self.made: dict[Any, Launch] = {}
        self._heads, self._key_heads, self.operand = B * H_v, B * H, operand_dtype(dtype)
        runs = B if p.tables is None else len(p.tables.bounds) - 1
        self.state = (runs, H_v, K, V)
        self.transition = (runs, H_v, K, K)
        self.states, self.moves = (B, H_v, p.segments, K, V), (B, H_v, p.segments, K, K)
        self.bounds_chunks, self.bounds = kind == TOKEN.value and not erases, (B, H_v, p.chunks)
        self.slots, self.norms = (B, H_v, p.chunks * p.chunk), (B, H, p.chunks * p.chunk)
        self.tiles = (B, H_v, p.chunks, p.chunk, p.chunk)
        self.state_chunks = (B, H_v, p.chunks, self._tile(V), self._tile(K))
        self.tails = (runs, H_v, *self.state_chunks[3:])
        self.gates = (-(-K // (OWN_COLUMNS if self.own else p.keys.columns)), B, T, H_v)
        self.per_channel = kind == CHANNEL.value
        self.bounded = self.per_channel and base_levels(self.operand) > 0
        self.totals, self.operands = (B, H_v, p.chunks, K), (B, T, H_v, K)
        self.summed = H_v > H or normalize
        self.gradient = (B, T, H_v, K)
        # To take the part along a key out of its gradient may cancel; to add up a group's heads does not.
        self.gradient_dtype = torch.float32 if normalize else self.operand
        sweeps = {"H": H_v if self.per_channel else H, "NORMALIZE": normalize and not self.per_channel}
        # What these names mean in every kernel; of sweeps, whose keys may have decays, some mean something else.
        self._known: dict[str, Any] = {
            "scale": scale, "B": B, "T": T, "H": H, "H_v": H_v, "K": K, "V": V, "eps": NORM_EPS,
            "segments": p.segments, "segment_chunks": p.segment_chunks, "chunks": p.chunks, "C": p.chunk,
            "BK": self._tile(K), "ROWS": self.state_chunks[3], "COLUMNS": self.state_chunks[4],
            "KIND": kind, "ERASES": erases, "EXACT": p.exact, "NORMALIZE": normalize, "GATE": with_gate,
            "FROM_ZERO": from_zero, "WHOLE": p.whole, "MARKED": self.bounded, "UNBOUNDED": self.bounded,
            "PLACED": self.placed, "JOINED": self.joined,
            "SPREAD": self.gradient_dtype.itemsize // self.operand.itemsize,
            "BASE": base_levels(self.operand), "LEVELS": p.chunk.bit_length() - 1,
            "DESCRIPTORS": p.descriptors, "STORES": p.descriptors and p.stores, "PACKED": p.packed,
            "PRECISION": p.precision,
        }  # fmt: skip
        self._sweeps = sweeps

    def _tile(self, dim: int) -> int:
        return tile(dim, self.operand)

    def _launch(self, kernel: Any, grid: tuple[int, int], warps: int, stages: int, **own: Any) -> Launch:
        """A launch of `kernel` with what is its own beside what is known of the run."""
        known = {name: self._known[name] for name in kernel.arg_names if name in self._known}
        own = {name: value for name, value in own.items() if name in kernel.arg_names}
        return bind(kernel, grid, {**known, **own}, warps=warps, stages=stages)

    def _sweep(self, kernel: Any, slices: int, tiles: Tiles, **own: Any) -> Launch:
        """A program for each segment of each head, and for each of so many slices of its states' columns."""
        grid = (slices * self._heads, self.plan.segments)
        return self._launch(kernel, grid, tiles.warps, tiles.stages, BV=tiles.columns, **self._sweeps, **own)

    def _by_chunk(self, kernel: Any, heads: int, warps: int, stages: int = 1, **own: Any) -> Launch:
        """A program for each chunk of each of so many heads."""
        return self._launch(kernel, (self.plan.chunks, heads), warps, stages, **own)

    @cached_property
    def gate_sums(self) -> Launch:
        (B, H_v), heads = self.slots[:2], min(GATE_SUMS_HEADS, triton.next_power_of_2(self.slots[1]))
        return self._by_chunk(gate_sums_kernel, -(-H_v // heads) * B, GATE_SUMS_WARPS, HEADS=heads)

    @cached_property
    def lengths(self) -> Launch:
        return self._by_chunk(norms_kernel, self._key_heads, 4)

    @cached_property
    def key_gradient_sum(self) -> Launch:
        return self._by_chunk(key_gradient_sum_kernel, self._key_heads, WIDE_WARPS)

    @cached_property
    def solve(self) -> Launch:
        p = self.plan
        normalize = self.normalize and not self.per_channel
        return self._by_chunk(solve_kernel, self._heads, p.solve, NORMALIZE=normalize, PRECISION=p.solve_precision)

    @cached_property
    def summary(self) -> Launch:
        tiles, (K, V) = self.plan.summary, self.state[2:]
        if self.own and K > OWN_COLUMNS:  # of fewer channels the general one is the faster
            return self._own("summary", (V + K) // OWN_COLUMNS, TOTAL=not self.from_zero)
        return self._sweep(delta_summary_kernel, -(-(V + K) // tiles.columns), tiles, TOTAL=not self.from_zero)

    @cached_property
    def output(self) -> Launch:
        tiles = self.plan.output
        if self.own:
            return self._own("output")
        return self._sweep(delta_output_kernel, -(-self.state[3] // tiles.columns), tiles)

    @cached_property
    def adjoint(self) -> Launch:
        return self._reverse(total=False, values=False)

    @cached_property
    def whole_adjoint(self) -> Launch:
        """The adjoint sweep where what the whole run adds to the gradient is wanted."""
        return self._reverse(total=True, values=False)

    @cached_property
    def values(self) -> Launch:
        # dg, in whose place D then lies, is fp32.
        ways = {"JOINED": True, "SPREAD": 2} if self.placed else {}
        return self._reverse(total=True, values=True, **ways)

    def _reverse(self, *, total: bool, values: bool, **own: Any) -> Launch:
        if self.own:
            return self._own("reverse", TOTAL=total, VALUES=values, **own)
        return self._state_sweep(delta_reverse_kernel, self.plan.reverse, TOTAL=total, VALUES=values)

    @cached_property
    def chunk_states(self) -> Launch:
        return self._state_sweep(delta_states_kernel, self.plan.states)

    def _state_sweep(self, kernel: Any, tiles: Tiles, **own: Any) -> Launch:
        """A sweep that writes the states of chunks, or their gradients: all their rows."""
        return self._sweep(kernel, self.state_chunks[3] // tiles.columns, tiles, **own)

    @cached_property
    def joined_gradients(self) -> Launch:
        return self._own("gradients")

    def _own(self, name: str, slices: int | None = None, **own: Any) -> Launch:
        """A sweep of Hopper's own, with so many slices of a state, by default of its columns; loaded where this Triton
        takes it."""
        slices = self.state[3] // OWN_COLUMNS if slices is None else slices
        module = importlib.import_module(f"lasp.kernels.triton.delta.hopper.{name}")
        kernel = getattr(module, f"delta_hopper_{name}_kernel")
        return self._sweep(kernel, slices, Tiles(OWN_COLUMNS, WIDE_WARPS, 1), **own)

    @cached_property
    def gradients(self) -> Launch:
        if self.own:
            return self._own("chunk_gradients", slices=self.state[2] // OWN_COLUMNS)
        return self._of_channels(delta_gradients_kernel, self.plan.keys)

    @_once
    def channel_gradients(self, *, bounded: bool) -> Launch:
        return self._of_channels(delta_channel_gradients_kernel, self.plan.channel, BOUNDED=bounded)

    def _of_channels(self, kernel: Any, tiles: Tiles, **own: Any) -> Launch:
        """A program for some channels of each chunk of each value head, in the order of `gradient_place`."""
        grid = (-(-self.state[2] // tiles.columns) * self._heads * self.plan.chunks, 1)
        sizes = {"BK": tiles.columns, "BV": self._values(tiles.columns)}
        return self._launch(kernel, grid, tiles.warps, tiles.stages, **sizes, **own)

    def _values(self, columns: int) -> int:
        """Columns of values at a time: few where a thread holds what it contracts, or where V is wide."""
        return min(self.state_chunks[3], columns if self.plan.exact else 128)

    @_once
    def channel_operands(self, *, queries: bool, keys: bool) -> Launch:
        columns, warps, stages = self.plan.operands
        ways = {"BK": columns, "QUERIES": queries, "KEYS": keys, "BOUNDED": self.bounded}
        # Programs of few chunks do without descriptors, and packed documents must: chunks end before they do.
        group = self.plan.operand_chunks
        described = self.plan.descriptors and group >= DESCRIPTOR_CHUNKS and not self.plan.packed
        ways |= {"group": group, "DESCRIPTORS": described, "STORES": described and self.plan.stores}
        grid = (-(-self.plan.chunks // group), self._heads)
        return self._launch(delta_channel_operands_kernel, grid, warps, stages, **ways)

    @_once
    def channel_scores(self, *, queries: bool, keys: bool) -> Launch:
        columns, warps, _ = self.plan.operands
        group = MARKED_CHUNKS if self.bounded else 1
        ways = {"BK": columns, "QUERIES": queries, "KEYS": keys, "GROUP": group}
        grid = ((queries + keys) * -(-self.plan.chunks // group), self._heads)
        return self._launch(delta_channel_scores_kernel, grid, warps, 1, **ways)

    @_once
    def scan(self, *, leaves: bool, reverse: bool) -> Launch:
        """The scan over segments' states; leaves: the state that leaves the run is wanted too, and its transition."""
        p, (runs, H_v, K, V) = self.plan, self.state
        columns = p.scan.columns
        slices = -(-V // columns) + (-(-K // columns) if leaves else 0)
        ways = {"LEAVES": leaves, "REVERSE": reverse, "PRECISION": p.solve_precision}
        sizes = {"BV": columns, "STEP": min(p.scan_step, self._tile(K))}
        grid = (slices * runs * H_v, 1)
        return self._launch(delta_scan_kernel, grid, p.scan.warps, p.scan.stages, **ways, **sizes)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 has no range for u where beta is next to zero, nor for states."""
    return torch.float32 if dtype == torch.float16 else dtype


@lru_cache(maxsize=256)
def _launches(
    q: tuple[int, ...], v: tuple[int, ...], dtype: torch.dtype, kind: int, device: torch.device, *others: Any
) -> DeltaLaunches:
    return DeltaLaunches(q, v, dtype, kind, _plan(q, v, dtype, kind, device), *others)


def _plan(q: tuple[int, ...], v: tuple[int, ...], dtype: torch.dtype, kind: int, device: torch.device) -> DeltaPlan:
    B, T, H_v, V = v
    return delta_plan(T, B * H_v, q[3], V, operand_dtype(dtype), kind, *device_limits(device))


def launches_of(x: DeltaInputs, from_zero: bool, with_gate: bool) -> DeltaLaunches:
    """The launches for such a run.

    from_zero: it is the whole sequence and starts from no state. with_gate: the gradient of the gate will be wanted.

    Raises:
        ValueError: the kernels do not take such tensors.
    """
    shapes = (x.q.shape, x.v.shape, x.q.dtype, kind_of(x.g), x.q.device)
    others: tuple[Any, ...] = (with_gate, x.normalize, x.scale, from_zero, x.erase_key is not None)
    if x.documents is None:
        return _launches(*shapes, *others)
    kept = x.documents.layouts
    if ("delta", shapes, others) not in kept:
        p = _plan(*shapes)
        p = p._replace(**packed_changes(p, x.documents, x.q.device))
        kept["delta", shapes, others] = DeltaLaunches(x.q.shape, x.v.shape, x.q.dtype, kind_of(x.g), p, *others)
    found: DeltaLaunches = kept["delta", shapes, others]
    return found
