"""The decay family's stages on a GPU (contract: `lasp.recurrence.contract`).

summarize: summary of every segment, scan over segments.  outputs: sweep of o.
summarize_adjoint: summary, reversed scan.  local_gradients: sweep of dq.  gradients: sweeps of dk (and dg), dv.
What is kept for backward is one state per segment, not per chunk, with other ranks' part applied.

Each stage prepares its inputs and calls the function of the same work on prepared ones (`*_of`), which the operators of
one device (`operators`) call directly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lasp.algebra import Identity, Scalar, Summary
from lasp.kernels.select import FUSED_DTYPES, FUSED_MAX_DIM
from lasp.kernels.triton.common.launch import launch, use_scratch
from lasp.kernels.triton.decay import channel_stages as channel
from lasp.kernels.triton.decay.gate_gradient import gate_gradient_kernel
from lasp.kernels.triton.decay.gates import CHANNEL, HEAD, NONE, TOKEN
from lasp.kernels.triton.decay.key_gradient import key_gradient_kernel
from lasp.kernels.triton.decay.layout import packed_plan, places_of
from lasp.kernels.triton.decay.output import output_kernel
from lasp.kernels.triton.decay.plan import Plan, plan, tile
from lasp.kernels.triton.decay.query_gradient import query_gradient_kernel
from lasp.kernels.triton.decay.scan import scan_kernel, scan_segments
from lasp.kernels.triton.decay.summary import summary_kernel
from lasp.kernels.triton.decay.sweep import PART_ROWS
from lasp.kernels.triton.decay.value_gradient import value_gradient_kernel
from lasp.recurrence.contract import Run

GROUPED_HEADS = True
SUMMARY_WITHOUT_QUERIES = True
BAD_GATES_GIVE_NAN = True
GATE_BLOCK, GATE_WARPS = 512, 4
MAX_GRID = 65535  # of a launch's second and third dims
INTERPRETED = (4, 1 << 20)
_devices: dict[torch.device, tuple[int, int]] = {}


class Segments(NamedTuple):
    """States [B, H_v, segments, K, V] at one end of each segment, decays [B, H_v, segments] (base 2) from the run's
    end on that side to them, and prefix, scale 2^prefix and 2^suffix [3, B, H_v, chunks C] (a gate per token, forward
    only)."""

    states: Tensor
    decays: Tensor
    gates: Tensor


class Saved(NamedTuple):
    """States entering each segment [B, H_v, segments, K, V], the state leaving the run [B, H_v, K, V], gates."""

    entering: Tensor
    leaving: Tensor
    gates: Tensor


def saved_list(saved: Any) -> list[Tensor]:
    """What an operator gives back of `saved`, or takes: first the state leaving the run."""
    others = saved.prepared if isinstance(saved, channel.Saved) else (saved.gates,)
    return [saved.leaving, saved.entering, *others]


def saved_of(g: Tensor | None, tensors: list[Tensor]) -> Any:
    """The inverse of `saved_list`."""
    leaving, entering, *others = tensors
    if per_channel(g):
        return channel.Saved(entering, leaving, channel.Prepared(*others))
    return Saved(entering, leaving, *others)


class QueryGradient(NamedTuple):
    """dq per value head [B, T, H_v, K], and q . dq in parts [parts, B, H_v, chunks C] where the decay's gradient is
    wanted."""

    dq: Tensor
    sums: Tensor


def kind_of(g: Tensor | None) -> int:
    """The kind of decay, as in `gates`."""
    if g is None:
        return NONE.value
    return (HEAD if g.dim() == 1 else TOKEN if g.dim() == 3 else CHANNEL).value


def per_channel(g: Tensor | None) -> bool:
    return kind_of(g) == CHANNEL.value


def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU and bytes of shared memory a program may have; a few processors for the interpreter.

    Raises:
        ValueError: Triton cannot run there.
    """
    if device not in _devices:
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            # AMD's properties lack the second; its devices have 64 KB.
            shared = getattr(properties, "shared_memory_per_block_optin", 65536)
            _devices[device] = (properties.multi_processor_count, shared)
        elif not isinstance(scan_kernel, triton.JITFunction):
            _devices[device] = INTERPRETED
        else:
            raise ValueError(
                f"backend 'triton' runs on a GPU (or on CPU under TRITON_INTERPRET=1), got tensors on {device}; "
                "use backend='torch'"
            )
    return _devices[device]


def plan_of(q: Tensor, v: Tensor, g: Tensor | None) -> Plan:
    """The launch configuration of one run of these tokens."""
    B, T, H_v, V = v.shape
    return plan(T, B * H_v, q.shape[3], V, q.dtype, kind_of(g), *device_limits(q.device))


def prepare(x: Run) -> tuple[Run, Plan]:
    """x with dense tensors, and its launch configuration.

    Raises:
        ValueError: the kernels do not take such tensors.
    """
    K, V = x.q.shape[3], x.v.shape[3]
    if x.q.dtype not in FUSED_DTYPES or max(K, V) > FUSED_MAX_DIM:
        raise ValueError(
            f"backend 'triton' takes bf16, fp16 and fp32 with K and V up to {FUSED_MAX_DIM}, got {x.q.dtype} with "
            f"K = {K}, V = {V}; use backend='torch'"
        )
    use_scratch()
    if not (
        x.q.is_contiguous() and x.k.is_contiguous() and x.v.is_contiguous() and (x.g is None or x.g.is_contiguous())
    ):
        # A copy made while nothing is recorded would no longer say that its gradient is wanted.
        g = None if x.g is None else x.g.contiguous().requires_grad_(x.g.requires_grad)
        x = x._replace(q=x.q.contiguous(), k=x.k.contiguous(), v=x.v.contiguous(), g=g)
    p = plan_of(x.q, x.v, x.g)
    if x.documents is not None:
        p = packed_plan(p, x.documents, x.q.device)
    programs = p.chunks if per_channel(x.g) else p.segments
    if programs > MAX_GRID:
        raise ValueError(
            f"backend 'triton' takes up to {MAX_GRID} {'chunks' if per_channel(x.g) else 'segments'} a rank (of "
            f"{p.chunk} tokens or more, or of one document), got {programs}; split the sequence over more ranks or use "
            "backend='torch'"
        )
    return x, p


def totals_of(x: Run, p: Plan, k: Tensor, v: Tensor, *, reverse: bool) -> tuple[Summary, Any]:
    if per_channel(x.g):
        return channel.summarize(x, p, k, v, reverse)
    B, T, H, K = k.shape
    H_v, V = v.shape[2:]
    kind, device, f32 = kind_of(x.g), k.device, torch.float32
    states = torch.empty(B, H_v, p.segments, K, V, dtype=f32, device=device)
    gates = torch.empty(2, B, H_v, p.segments, dtype=f32, device=device)
    decays, before = gates[0], gates[1]
    places = places_of(p, states)
    if kind == TOKEN.value and not reverse:
        gates = torch.empty(3, B, H_v, p.chunks * p.chunk, dtype=f32, device=device)
    columns, warps, stages = p.summary
    launch(
        summary_kernel, (-(-V // columns) * H_v * B, p.segments),
        (k, v, k if x.g is None else x.g, states, decays, gates[0], gates[1], gates[-1], places),
        (x.scale, T, H, H_v, p.segments, p.segment_chunks, p.chunks),
        (K, V, tile(K, x.q.dtype), columns, p.chunk, kind, reverse, p.descriptors, p.packed, p.precision),
        warps, stages,
    )  # fmt: skip
    total, total_decay = scan_segments(x, p, states, decays, before, reverse=reverse)
    return Summary(Identity() if x.g is None else Scalar(total_decay), total), Segments(states, before, gates)


def summarize(x: Run) -> tuple[Summary, Any]:
    x, p = prepare(x)
    return totals_of(x, p, x.k, x.v, reverse=False)


def local_outputs(x: Run, totals: Any) -> Any:
    return local_outputs_of(*prepare(x))


def local_outputs_of(x: Run, p: Plan) -> Any:
    return channel.local_outputs(x, p) if per_channel(x.g) else None


def outputs(x: Run, totals: Any, partial: Any, state_in: Tensor) -> tuple[Tensor, Any]:
    return outputs_of(*prepare(x), totals, partial, state_in.contiguous())


def outputs_of(x: Run, p: Plan, totals: Any, partial: Any, state_in: Tensor) -> tuple[Tensor, Any]:
    if per_channel(x.g):
        return channel.outputs(x, p, totals, partial, state_in)
    B, T, H, K = x.q.shape
    H_v, V = x.v.shape[2:]
    o = torch.empty_like(x.v)
    leaving = torch.empty_like(state_in)
    places = places_of(p, leaving)
    columns, warps, stages = p.values
    launch(
        output_kernel, (-(-V // columns) * H_v * B, p.segments),
        (x.q, x.k, x.v, x.q if x.g is None else x.g, *_three(totals.gates), o,
         totals.states, totals.decays, state_in, leaving, places),
        (x.scale, T, H, H_v, p.segments, p.segment_chunks, p.chunks),
        (K, V, tile(K, x.q.dtype), columns, p.chunk, kind_of(x.g), p.exact, p.descriptors, p.packed, p.precision),
        warps, stages,
    )  # fmt: skip
    return o, Saved(totals.states, leaving, totals.gates)


def summarize_adjoint(x: Run, d_o: Tensor) -> tuple[Summary, Any]:
    x, p = prepare(x)
    return totals_of(x, p, x.q, d_o.contiguous(), reverse=True)


def local_gradients(x: Run, saved: Any, totals_adjoint: Any, d_o: Tensor) -> Any:
    return local_gradients_of(*prepare(x), saved, d_o.contiguous())


def local_gradients_of(x: Run, p: Plan, saved: Any, d_o: Tensor) -> Any:
    if per_channel(x.g):
        return channel.local_gradients(x, p, saved, d_o)
    B, T, H, K = x.q.shape
    H_v, V = x.v.shape[2:]
    with_decay = _with_decay(x)
    columns, warps, stages = p.scalar_keys if with_decay else p.keys
    slices = -(-K // columns)
    dq = torch.empty(B, T, H_v, K, dtype=partial_dtype(x), device=x.q.device)
    places = places_of(p, dq)
    sums = saved.leaving
    if with_decay:
        shape = (slices * columns // PART_ROWS.value, B, H_v, p.chunks * p.chunk)
        sums = torch.empty(shape, dtype=torch.float32, device=dq.device)
    launch(
        query_gradient_kernel, (slices * H_v * B, p.segments),
        (x.q, x.k, x.v, d_o, x.q if x.g is None else x.g, *_three(saved.gates), dq, sums, saved.entering, places),
        (x.scale, B, T, H, H_v, p.segments, p.segment_chunks, p.chunks),
        (K, V, columns, tile(V, x.q.dtype), p.chunk, kind_of(x.g), with_decay, p.exact, p.descriptors, p.packed,
         p.precision),
        warps, stages,
    )  # fmt: skip
    return QueryGradient(dq, sums)


def gradients(
    x: Run, saved: Any, totals_adjoint: Any, local: Any, d_o: Tensor, d_state_out: Tensor
) -> tuple[Tensor | None, ...]:
    return gradients_of(*prepare(x), saved, totals_adjoint, local, d_o.contiguous(), d_state_out.contiguous())


def gradients_of(
    x: Run, p: Plan, saved: Any, totals_adjoint: Any, local: Any, d_o: Tensor, d_state_out: Tensor
) -> tuple[Tensor | None, ...]:
    if per_channel(x.g):
        dtype = partial_dtype(x)
        dq, dk, dv, d_gate = channel.gradients(x, p, saved, totals_adjoint, local, d_o, d_state_out, dtype)
        return _sum_groups(x, dq), _sum_groups(x, dk), dv, d_gate
    B, T, H, K = x.q.shape
    H_v, V = x.v.shape[2:]
    g = x.q if x.g is None else x.g
    gates = _three(saved.gates)
    d_states, after, _ = totals_adjoint
    with_decay = _with_decay(x)

    dk = torch.empty_like(local.dq)
    places = places_of(p, dk)
    columns, warps, stages = p.scalar_keys if with_decay else p.keys
    slices = -(-K // columns)
    sums = carry = local.sums
    if with_decay:
        sums, carry = torch.empty_like(sums), after.new_empty(slices, B, H_v, p.segments)
    launch(
        key_gradient_kernel, (slices * H_v * B, p.segments),
        (x.q, x.k, x.v, d_o, g, *gates, dk, sums, carry,
         saved.entering, saved.leaving, d_states, after, d_state_out, places),
        (x.scale, B, T, H, H_v, p.segments, p.segment_chunks, p.chunks),
        (K, V, columns, tile(V, x.q.dtype), p.chunk, kind_of(x.g), with_decay, p.exact, p.descriptors, p.packed,
         p.precision),
        warps, stages,
    )  # fmt: skip

    dv = torch.empty_like(x.v)
    columns, warps, stages = p.values
    launch(
        value_gradient_kernel, (-(-V // columns) * H_v * B, p.segments),
        (x.q, x.k, d_o, g, *gates, dv, d_states, after, d_state_out, places),
        (x.scale, T, H, H_v, p.segments, p.segment_chunks, p.chunks),
        (K, V, tile(K, x.q.dtype), columns, p.chunk, kind_of(x.g), p.exact, p.descriptors, p.packed, p.precision),
        warps, stages,
    )  # fmt: skip
    d_gate = _gate_gradient(x, p, local.sums, sums, carry) if with_decay else None
    return _sum_groups(x, local.dq), _sum_groups(x, dk), dv, d_gate


def _with_decay(x: Run) -> bool:
    """Whether the decay's gradient is wanted: it needs other, slower sweeps."""
    return x.g is not None and x.g.requires_grad


def _three(gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """prefix, scale 2^prefix and 2^suffix; without a gate per token, anything."""
    return gates[0], gates[1], gates[-1]


def _gate_gradient(x: Run, p: Plan, q_sums: Tensor, k_sums: Tensor, carry: Tensor) -> Tensor:
    """Like g."""
    assert x.g is not None
    B, T, H_v = x.v.shape[:3]
    dg = torch.empty(B, T, H_v, dtype=torch.float32, device=x.q.device)
    launch(
        gate_gradient_kernel, (B * H_v, p.segments), (q_sums, k_sums, carry, dg, places_of(p, dg)),
        (T, B * H_v, H_v, p.segments, p.segment_chunks, p.chunks),
        (p.chunk, q_sums.shape[0], carry.shape[0], GATE_BLOCK, p.packed), GATE_WARPS, 1,
    )  # fmt: skip
    return dg.sum((0, 1)) if x.g.dim() == 1 else dg


def partial_dtype(x: Run) -> torch.dtype:
    """Of dq and dk per value head: fp32 where heads of one group are still to be summed."""
    return x.q.dtype if x.q.shape[2] == x.v.shape[2] else torch.float32


def _sum_groups(x: Run, gradient: Tensor) -> Tensor:
    """[B, T, H_v, K] -> [B, T, H, K]."""
    heads = x.q.shape[2]
    if gradient.shape[2] == heads:
        return gradient
    return gradient.unflatten(2, (heads, -1)).sum(3).to(x.q.dtype)
