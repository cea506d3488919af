"""Tells whether results are near enough, by the policy on numerics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import DTYPES, Case, Problem
from .solve import Results, exact

# Relative errors of outputs and states, and of gradients, by the dtype that computes.
BOUNDS = {"fp64": (1e-12, 1e-12), "fp32": (2e-6, 2e-6), "bf16": (5e-3, 8e-3), "fp16": (1.5e-3, 1.5e-3)}
# fp32's is of so many tokens; it is five times that of a million.
TOKENS, MILLION = 4096, 1 << 20
# What is lost without fault: results smaller than these, for which a dtype has no digits.
SMALLEST = {torch.float64: 1e-290, torch.float32: 1e-35, torch.bfloat16: 1e-35, torch.float16: 6e-8}
LARGEST_FP16 = 6e4
# Of the size of all heads, a head's that is none.
NOTHING = 1e-12
# Instead of no size at all, relative to which nothing is near.
NO_SIZE = 1e-290
UNIT = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-9, "fp16": 2.0**-12}
# Where terms cancel, rounding the inputs once more moves the result, so no algorithm is nearer than that, times this:
# of fp32 and fp64 for what is rounded on the way (what cancels nothing then stays within BOUNDS), of 16 bits, whose
# products add in fp32, for little.
CONDITION, SAMPLES = {"fp64": 24.0, "fp32": 24.0, "bf16": 4.0, "fp16": 4.0}, 8
# Of the same in PyTorch in 16 bits: where keys are alike, a chunk of the delta rule adds up writes that erase each
# other, each rounded.
TIMES_PYTORCH = 1.2
GATES = ("d_g", "d_beta")
# Of a unit: what as many roundings as there are terms seldom add up to, relative to the terms' root of squares.
ROUNDINGS = 4.0


class Finding(NamedTuple):
    what: str
    error: float
    bound: float

    def __str__(self) -> str:
        return f"{self.what} off by {self.error:.1e}, allowed {self.bound:.1e}"


def findings(case: Case, problem: Problem, values: Results) -> list[Finding]:
    """Results that are not near enough."""
    references = exact(case, problem)
    if values.keys() != references.keys():
        return [Finding(f"results {sorted(values)} for {sorted(references)}", math.inf, 0.0)]
    expected, found = _views(case, references), _views(case, values)
    sizes = {what: each.norm().item() for what, each in expected.items()}
    for name in GATES:
        # Decays of zero have a gradient of zero: what rounding leaves there is judged by the size of all heads.
        whole = references[name].norm().item() if name in references else 0.0
        for what, size in sizes.items():
            if what.startswith(f"{name} ") and size <= NOTHING * whole:
                sizes[what] = whole
    if case.op in ("normalized", "softmax") or case.normalize:
        # Gradients through a denominator cancel those through the numerator: all, of one token alone or one channel.
        numerators = _views(case, exact(case, problem, through_denominators=False))
        sizes = {what: max(size, numerators[what].norm().item()) for what, size in sizes.items()}
    lost = _lost(references, values)
    suspects = []
    for what, value in found.items():
        if value.shape != expected[what].shape:
            suspects.append(Finding(f"{what} of shape {tuple(value.shape)}", math.inf, 0.0))
            continue
        error = relative_error(case, value, expected[what], sizes[what], lost.get(what, 0.0))
        bound = _bound(case, what, value.dtype)
        if not error <= bound:
            suspects.append(Finding(what, error, bound))
    if not suspects or any(not math.isfinite(each.error) for each in suspects):
        return suspects
    suspected = {each.what: sizes[each.what] for each in suspects}
    allowed = {
        what: CONDITION[_computes(case)] * far for what, far in _moved(case, problem, expected, suspected).items()
    }
    if case.op == "delta" and case.fused and _computes(case) == "bf16":
        for what, far in _in_pytorch(case, problem, expected, suspected).items():
            allowed[what] = max(allowed[what], TIMES_PYTORCH * far)
    kept = [each._replace(bound=max(each.bound, allowed[each.what])) for each in suspects]
    return [each for each in kept if each.error > each.bound]


def relative_error(case: Case, value: Tensor, reference: Tensor, size: float, lost: float = 0.0) -> float:
    """||value - reference|| / size, less what dtypes have no digits for, and what is `lost`. NaN is infinite."""
    if value.dtype == torch.float16 and reference.numel() and reference.abs().max() > LARGEST_FP16:
        return 0.0  # it has no such numbers
    smallest = max(SMALLEST[value.dtype], SMALLEST[DTYPES[_computes(case)]])
    off = (value.double() - reference).norm().item() - smallest * math.sqrt(value.numel())
    return math.inf if off != off else max(off - lost, 0.0) / max(size, NO_SIZE)


def _lost(references: Results, values: Results) -> dict[str, float]:
    """Returns what of sums of gates' gradients their terms, each rounded to its dtype, do not hold."""
    lost = {}
    for name in GATES:
        if name in values:
            unit = next(UNIT[key] for key, dtype in DTYPES.items() if dtype == values[name].dtype)
            for head, terms in enumerate(references[name].unbind(2)):
                lost[f"{name} of head {head}, summed"] = ROUNDINGS * unit * terms.norm().item()
    return lost


def _views(case: Case, results: Results) -> Results:
    """Every tensor; of gates and betas every head by itself, by token and summed over tokens."""
    views = {name: t for name, t in results.items() if name not in GATES}
    for name in GATES:
        if name not in results:
            continue
        whole = results[name]
        if name == "d_g" and case.gate == "constant":  # the reference's are of tokens
            summed = whole if whole.dim() == 1 else whole.sum((0, 1))
        else:
            views[name] = whole
            views |= {f"{name} of head {head}": whole[:, :, head] for head in range(whole.shape[2])}
            summed = whole.double().sum(1).to(whole.dtype).movedim(1, 0)
        views |= {f"{name} of head {head}, summed": each for head, each in enumerate(summed)}
    return views


def _bound(case: Case, what: str, dtype: torch.dtype) -> float:
    name = what.split(" ")[0]
    computed = _computes(case)
    bound = BOUNDS[computed][name.startswith("d_")] * _growth(case)
    names = [key for key, value in DTYPES.items() if value == dtype]
    if case.gate_dtype in ("bf16", "fp16") and name in GATES:
        names.append(case.gate_dtype)
    return max(bound, *(BOUNDS[key][name.startswith("d_")] for key in names))


def _computes(case: Case) -> str:
    """Recurrences that are not fused compute in fp32 and round the results; fused ones multiply in 16 bits, but the
    delta rule's not in fp16."""
    is_fused = case.fused and not (case.op == "delta" and case.dtype == "fp16")
    is_wide = case.op in ("linear", "delta") and not is_fused and case.dtype != "fp64"
    return "fp32" if is_wide else case.dtype


def _growth(case: Case) -> float:
    """Factor by which rounding grows with the tokens that one result adds up."""
    longest = max(1, case.longest)
    return max(1.0, (longest / TOKENS) ** (math.log(5.0) / math.log(MILLION / TOKENS)))


def _moved(case: Case, problem: Problem, expected: Results, sizes: dict[str, float]) -> dict[str, float]:
    """Measures how far results move when every number given is rounded once more, at random, as it is computed with."""
    rounding = Rounding(case, problem)
    exactly = replace(case, dtype="fp64")

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else rounding.of(tensor.double())

    def sample() -> Results:
        inputs = {name: moved(t) for name, t in problem.inputs.items()}
        return exact(exactly, Problem(inputs, moved(problem.d_o), moved(problem.d_final)))

    return _furthest(case, sample, expected, sizes)


def _in_pytorch(case: Case, problem: Problem, expected: Results, sizes: dict[str, float]) -> dict[str, float]:
    """Measures how far chunks of the delta rule are off whose products take and give 16 bits, backward too: to the
    nearest such number, and at random, since sums of few may be near by chance."""
    dtype, rounding = DTYPES[_computes(case)], Rounding(case, problem)

    def nearest(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    def near(x: Tensor) -> Tensor:
        return torch.where(nearest(x) == x, x, rounding.of(x))

    ways = iter([nearest, *[near] * (SAMPLES - 1)])

    def sample() -> Results:
        return exact(case, problem, rounded=partial(_RoundedBothWays.apply, next(ways)))

    return _furthest(case, sample, expected, sizes)


def _furthest(
    case: Case, sample: Callable[[], Results], expected: Results, sizes: dict[str, float]
) -> dict[str, float]:
    furthest = dict.fromkeys(sizes, 0.0)
    for _ in range(SAMPLES):
        views = _views(case, sample())
        for name, size in sizes.items():
            furthest[name] = max(furthest[name], relative_error(case, views[name], expected[name], size))
    return furthest


class Rounding:
    """Rounds numbers at random, by as much as the dtype that computes a case does."""

    def __init__(self, case: Case, problem: Problem) -> None:
        self._unit = UNIT[_computes(case)]
        self._generator = torch.Generator(problem.d_o.device).manual_seed(case.seed)

    def of(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=self._generator, device=x.device, dtype=torch.float64)
        return x * (1 + self._unit * (2 * noise - 1))


class _RoundedBothWays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.of = of
        return of(x)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[None, Tensor]:
        return None, ctx.of(d)
