"""A case's results: by the library, on one device or on ranks, and by the reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import lasp

from . import reference
from .cases import Case, Problem, options

OPERATORS = {
    "linear": "linear_attention",
    "normalized": "normalized_linear_attention",
    "delta": "delta_rule",
    "convolution": "short_convolution",
    "shift": "token_shift",
    "softmax": "softmax_attention",
}
LEARNED = {"all": None, "no gate": ("q", "k", "v", "x", "weight", "bias", "beta", "initial_state"), "queries": ("q",)}
EPS = 1e-6
MIN_FUSED_BETA = 2.0**-50  # src/lasp/kernels/triton/delta/chunk.py

Results = dict[str, Tensor]


def library(case: Case, problem: Problem, sp: Any = None) -> Results:
    """Returns what the operator gives: o, final and gradients d_*; with `sp` of this rank's tokens."""
    leaves = {}
    for name, tensor in problem.inputs.items():
        local = tensor if tensor is None or sp is None or not _has_tokens(name, tensor) else sp.shard(tensor)
        wanted = local is not None and _is_learned(case, name)
        # Not a copy: that would have a layout of its own.
        leaves[name] = None if local is None else local.detach().requires_grad_(wanted)
    d_o, d_final = problem.d_o, problem.d_final
    if sp is not None:  # the ranks' shares of the final state's gradient
        d_o, d_final = sp.shard(d_o), d_final * (2.0 * sp.rank + 1.0) / sp.size**2
    keywords = options(case) | {"initial_state": leaves.pop("initial_state"), "sp": sp}
    start = keywords["initial_state"]
    o, final = getattr(lasp, OPERATORS[case.op])(**leaves, **keywords)
    leaves["initial_state"] = start
    results = {"o": o.detach()} | ({} if final is None else {"final": final.detach()})
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}  # type: ignore[assignment]
    return results | _gradients(o, final, d_o, d_final, wanted)  # type: ignore[arg-type]


def exact(
    case: Case, problem: Problem, *, through_denominators: bool = True, rounded: reference.Rounding | None = None
) -> Results:
    """Returns what it should give, in fp64. The gradient of a constant decay is that of every token, d_g [B, T, H_v].

    through_denominators: False for no gradients through those of normalized and softmax attention, queries and keys.
    rounded: what a delta rule in chunks does to the operands of its products, instead of the loop.
    """
    leaves = {name: None if t is None else _seen(case, name, t).double() for name, t in problem.inputs.items()}
    g = leaves.get("g")
    if g is not None and g.dim() == 1:
        leaves["g"] = g.expand(case.batch, case.tokens, -1).contiguous()
    leaves = {
        n: None if t is None else t.detach().clone().requires_grad_(_is_learned(case, n)) for n, t in leaves.items()
    }
    o, final = _operator(case, leaves, through_denominators, rounded)
    results = {"o": o.detach()} | ({"final": final.detach()} if case.final else {})
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    return results | _gradients(
        o, final if case.final else None, problem.d_o.double(), problem.d_final.double(), wanted
    )


def joined(case: Case, parts: list[Results]) -> Results:
    """The ranks' results as one device's: shards joined, shares summed."""
    whole = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "final":
            assert all(torch.equal(value, values[0]) for value in values), "the final state is not the same everywhere"
            whole[name] = values[0]
        elif name == "d_initial_state":
            assert not any(value.any() for value in values[1:]), "only the first rank has the initial state's gradient"
            whole[name] = values[0]
        elif name in ("d_weight", "d_bias") or (name == "d_g" and case.gate == "constant"):
            whole[name] = torch.stack(values).sum(0)
        else:
            whole[name] = torch.cat(values, 1)
    return whole


def _has_tokens(name: str, tensor: Tensor) -> bool:
    return name not in ("weight", "bias", "initial_state") and tensor.dim() > 1


def _is_learned(case: Case, name: str) -> bool:
    if case.learned == "nothing" or (name == "initial_state" and case.initial != "learned"):
        return False
    names = LEARNED[case.learned]
    return names is None or name in names


def _seen(case: Case, name: str, tensor: Tensor) -> Tensor:
    """Inputs as the operator takes them: gates and betas in the state's dtype; none of a fused beta is zero."""
    if name not in ("g", "beta"):
        return tensor
    if name == "beta" and case.fused:
        tensor = tensor.clamp(min=MIN_FUSED_BETA)
    return tensor if case.dtype == "fp64" else tensor.float()


def _gradients(
    o: Tensor, final: Tensor | None, d_o: Tensor, d_final: Tensor, leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    outputs = [(o, d_o)] + ([] if final is None else [(final, d_final)])
    outputs = [(value, d.to(value.dtype)) for value, d in outputs if value.requires_grad]
    if not outputs or not leaves:  # without tokens nothing may depend on them
        return {f"d_{name}": torch.zeros_like(t) for name, t in leaves.items()}
    values, ds = zip(*outputs, strict=True)
    found = torch.autograd.grad(values, list(leaves.values()), ds, allow_unused=True)
    return {
        f"d_{name}": torch.zeros_like(t) if d is None else d
        for (name, t), d in zip(leaves.items(), found, strict=True)
    }  # fmt: skip


def _operator(
    case: Case, x: dict[str, Tensor | None], through_denominators: bool, rounded: reference.Rounding | None
) -> tuple[Tensor, Tensor]:
    start, bounds, scale = x["initial_state"], case.cu_seqlens, case.scale
    if case.op in ("convolution", "shift"):
        return _rows(case, x)
    q, k, v, g = x["q"], x["k"], x["v"], x.get("g")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if case.op == "softmax":
        return _softmax(case, q, k, v, start, scale, through_denominators)
    if case.op == "delta" and case.normalize:
        q, k = (reference.unit(t, through_denominators) for t in (q, k))
    q, k = (t.repeat_interleave(case.groups, 2) for t in (q, k))
    if case.op == "normalized":
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if start is None:
        states = case.batch if bounds is None else len(bounds) - 1
        start = q.new_zeros(states, v.shape[2], q.shape[3], v.shape[3])
    starts = [start] if bounds is None else list(start.split(1))
    tensors = [q, k, v] + ([x["beta"]] if case.op == "delta" else []) + ([] if g is None else [g])
    o, finals = reference.packed(bounds, partial(_recurrence, case, scale, rounded), starts, *tensors)
    if case.op == "normalized":
        denominator = o[..., -1:] + EPS
        o = o[..., :-1] / (denominator if through_denominators else denominator.detach())
    return o, torch.cat(finals)


def _recurrence(
    case: Case, scale: float, rounded: reference.Rounding | None, state: Tensor, *x: Tensor
) -> tuple[Tensor, Tensor]:
    if case.op == "delta":
        q, k, v, beta, *g = x
        gate = g[0] if g else None
        if rounded is not None:
            return reference.delta_chunks(q, k, v, beta, gate, state, scale, rounded)
        return reference.delta(q, k, v, beta, gate, state, scale)
    q, k, v, *g = x
    if not case.causal:
        return reference.unmasked(q, k, v, state, scale)
    return reference.decay(q, k, v, g[0] if g else None, state, scale)


def _rows(case: Case, x: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    rows, start, bounds = x["x"], x["initial_state"], case.cu_seqlens
    shift = case.op == "shift"
    weight = x.get("weight")
    if shift:  # the row before is a convolution
        weight = torch.tensor([1.0, 0.0]).to(rows).expand(case.keys, 2)
        start = None if start is None else start[..., None]
    if start is None:
        states = case.batch if bounds is None else len(bounds) - 1
        start = rows.new_zeros(states, case.keys, weight.shape[1] - 1)
    activation = None if shift else case.activation

    def function(state: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        return reference.convolution(part, weight, x.get("bias"), state, activation)

    o, finals = reference.packed(bounds, function, [start] if bounds is None else list(start.split(1)), rows)
    final = torch.cat(finals)
    return o, final[..., 0] if shift else final


def _softmax(
    case: Case, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, scale: float, through_denominators: bool
) -> tuple[Tensor, Tensor]:
    bounds = case.cu_seqlens
    parts = 1 if bounds is None else len(bounds) - 1
    if start is None:
        start = k.new_zeros(case.batch, 0, case.heads, case.keys + case.values)
    starts = list(start.tensor_split(parts, 1))

    def function(state: Tensor, *x: Tensor) -> tuple[Tensor, Tensor]:
        options = (case.causal, scale, case.window, case.softcap, through_denominators)
        return reference.softmax(*x, state, *options)  # type: ignore[arg-type, call-arg]

    o, finals = reference.packed(bounds, function, starts, q, k, v)
    return o, torch.cat(finals, 1)
