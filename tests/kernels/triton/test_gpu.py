"""Every launch configuration on the GPU, through the public operator, against the chunked PyTorch backend in fp64.

Collected only where there is a GPU. A configuration is what the plan makes of dtype, dims, kind of decay and length:
tiles, chunks, and whether chunks move by descriptors. Long cases are planned as for a device of 8 processors, which
gives a few heads segments as long as many have on a whole one: the same kernels, and a reference in no time. Gates are
weak, so that a missing state shows; then strong, and exactly zero. `--junitxml FILE` keeps all errors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_gpu_cases import BF16, BOUNDS, CASES, FP16, FP32, GATHERED, KINDS, PAIRED, SHORT, UNLEARNED, Case
from tolerances import relative_error
from torch import Tensor

import lasp
from lasp.kernels.limits import FUSED_MAX_DIM
from lasp.kernels.triton.common import device as devices
from lasp.kernels.triton.decay import runs
from lasp.kernels.triton.decay.stages import STAGES as fused
from lasp.kernels.triton.delta import launches as delta_launches
from lasp.kernels.triton.delta.launches import DeltaLaunches
from lasp.recurrence.inputs import DecayInputs

DEVICE = torch.device("cuda", 0)
MILLION = [Case(kind, BF16, 64, 64, T=1 << 20, H=2, H_v=2, gates="weakest", processors=None) for kind in KINDS]


def gate(case: Case, random: torch.Generator) -> Tensor | None:
    if case.kind == "none":
        return None
    shape = {
        "constant": (case.H_v,),
        "scalar": (case.B, case.T, case.H_v),
        "channel": (case.B, case.T, case.H_v, case.K),
    }[case.kind]
    size = torch.rand(shape, device="cuda", generator=random)
    if case.gates == "strong":
        # Most are weak, some as strong as they come; of constants the first head's are weak.
        strong = torch.rand(shape, device="cuda", generator=random) < 0.1
        if case.kind == "constant":
            strong = torch.arange(case.H_v, device="cuda") > 0
        return -torch.where(strong, 20 * size, 0.05 * size)
    return -{"strongest": 20.0, "weak": 0.05, "zero": 0.0, "weakest": 1e-6}[case.gates] * size


def inputs(case: Case) -> tuple[dict[str, Any], Tensor, Tensor]:
    """q, k, v, g and the initial state, and the gradients of the outputs and the final state."""
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=random)

    B, T, H, H_v, K, V = case.B, case.T, case.H, case.H_v, case.K, case.V
    x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H_v, V)}
    x = {name: tensor.to(case.dtype) for name, tensor in x.items()}
    g = gate(case, random)
    x |= {} if g is None else {"g": g}
    d_o, states = normal(B, T, H_v, V).to(case.dtype), (case.states, H_v, K, V)
    initial = {"initial_state": normal(*states)} if case.initial else {}
    return x | initial, d_o, normal(*states)


def solve(
    x: dict[str, Tensor],
    d_o: Tensor,
    d_final: Tensor,
    backend: str,
    dtype: torch.dtype | None,
    documents: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    leaves: dict[str, Any] = {
        name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in x.items()
    }
    o, final = lasp.linear_attention(**leaves, output_final_state=True, cu_seqlens=documents, backend=backend)
    gradients = torch.autograd.grad((o, final), list(leaves.values()), (d_o.to(o.dtype), d_final.to(final.dtype)))
    return {"o": o.detach(), "final_state": final.detach()} | {
        f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def limits(case: Case) -> tuple[int, int, bool]:
    """Describes what the case is planned for: processors, and otherwise the device."""
    processors, *others = devices.device_limits(DEVICE)
    return (case.processors or processors, *others)  # type: ignore[return-value]


def check(case: Case, record: Callable[[str, object], None]) -> None:
    x, d_o, d_final = inputs(case)
    runs.launches_of.cache_clear()  # which shapes and the device decide
    with patch.dict(devices._devices, {DEVICE: limits(case)}):
        values = solve(x, d_o, d_final, "triton", None, case.documents)
    if "LASP_TEST_PART" in os.environ:
        return  # this process is here to compile (conftest.py); many references at once would not fit the GPU
    references = solve(x, d_o, d_final, "torch", torch.float64, case.documents)
    errors = {name: relative_error(values[name], references[name]) for name in values}
    for name, error in errors.items():
        record(name, f"{error:.2e}")
    bounds = BOUNDS[case.dtype]
    d_g = bounds.d_constant if case.kind == "constant" else bounds.gradients
    allowed = {"o": bounds.outputs, "final_state": bounds.outputs, "d_g": d_g}
    bad = {name: error for name, error in errors.items() if error > allowed.get(name, bounds.gradients)}
    assert not bad, {name: f"{error:.1e}" for name, error in errors.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configuration(case: Case, record_property: Callable[[str, object], None]) -> None:
    check(case, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", MILLION, ids=str)
def test_a_million_tokens(case: Case, record_property: Callable[[str, object], None]) -> None:
    """Gates that forget next to nothing: any error in a state would add up."""
    check(case, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_more_elements_than_32_bits_count(kind: str) -> None:
    """The last tokens, beyond 2^31 elements, against a run of the last tokens alone: decays forget the rest."""
    H, K, V, tail, near = 16, 128, 64 if kind == "channel" else 128, 2048, 1024
    T = (1 << 31) // (H * K) + 2 * tail
    torch.manual_seed(0)

    def normal(dim: int) -> Tensor:
        return torch.randn(1, T, H, dim, device="cuda", dtype=BF16)

    x = {"q": normal(K), "k": normal(K), "v": normal(V)}
    x["g"] = torch.full((1, T, H, K) if kind == "channel" else (1, T, H), -0.2, device="cuda")
    d_o = normal(V)
    exact: dict[str, Any] = {name: tensor[:, -tail:].double().requires_grad_() for name, tensor in x.items()}
    leaves = [tensor.requires_grad_() for tensor in x.values()]
    o, _ = lasp.linear_attention(*leaves, backend="triton")
    values = (o, *torch.autograd.grad(o, leaves, d_o))
    expected, _ = lasp.linear_attention(**exact, backend="torch")
    references = (expected, *torch.autograd.grad(expected, list(exact.values()), d_o[:, -tail:].double()))
    for name, value, reference in zip(("o", *x), values, references, strict=True):
        assert relative_error(value[:, -near:], reference[:, -near:]) <= BOUNDS[BF16].gradients, name


@pytest.mark.parametrize(
    "dims",
    [{}, PAIRED, PAIRED | {"documents": (0, 5000, 5001, PAIRED["T"])}, GATHERED | {"H_v": 4}],
    ids=["short", "long", "packed", "gathered"],
)
@pytest.mark.parametrize(("kind", "D"), UNLEARNED)
def test_decays_that_are_not_learned(kind: str, D: int, dims: dict[str, Any]) -> None:
    """Other sweeps than where the gate's gradient is wanted; of long runs dk and dv are made in one launch."""
    case = Case(kind, BF16, D, D, **dims)
    x, d_o, d_final = inputs(case)
    names = [name for name in x if name != "g"]
    leaves = [x[name].requires_grad_() for name in names]
    runs.launches_of.cache_clear()
    with patch.dict(devices._devices, {DEVICE: limits(case)}):
        q, k, v = (x[name][..., :FUSED_MAX_DIM] for name in "qkv")
        found = fused.prepare(DecayInputs(q, k, v, x.get("g"), 1.0), not case.initial).launches
        assert found.paired == bool(dims)  # type: ignore[union-attr]
        o, final = lasp.linear_attention(**x, output_final_state=True, cu_seqlens=case.documents, backend="triton")
    values = torch.autograd.grad((o, final), leaves, (d_o, d_final))
    references = solve(x, d_o, d_final, "torch", torch.float64, case.documents)
    assert relative_error(o, references["o"]) <= BOUNDS[BF16].outputs
    for name, value in zip(names, values, strict=True):
        assert relative_error(value, references[f"d_{name}"]) <= BOUNDS[BF16].gradients, name


def test_auto_takes_the_kernels_and_captures_in_a_graph() -> None:
    """The host waits for nothing: a forward and backward is captured, and replayed with other inputs."""
    x, d_o, _ = inputs(Case("scalar", BF16, 64, 64, **SHORT))
    leaves = [x[name].requires_grad_() for name in "qkvg"]

    def step() -> tuple[Tensor, ...]:
        o, _ = lasp.linear_attention(*leaves)
        return o, *torch.autograd.grad(o, leaves, d_o)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[2].copy_(torch.randn_like(leaves[2]))
    graph.replay()
    again = step()
    for first, second in zip(captured, again, strict=True):
        assert torch.equal(first, second)


# Segments are long enough for what sweeps of long ones alone have.
DELTA = {"T": 20037, "H": 2, "H_v": 4, "initial": True}


@pytest.mark.parametrize("dims", [DELTA, DELTA | {"documents": (0, 1, 700, 764, 3100, 20037)}], ids=["long", "packed"])
@pytest.mark.parametrize("kind", ["none", "scalar", "channel"])
@pytest.mark.parametrize(
    ("dtype", "K", "V"), [(BF16, 128, 128), (BF16, 256, 512), (BF16, 72, 40), (FP16, 64, 64), (FP32, 128, 128)], ids=str
)
def test_delta_rule(dtype: torch.dtype, K: int, V: int, kind: str, dims: dict[str, Any]) -> None:
    """Segments are as the device's processors decide, with what the interpreter has not: the copy engine's tiles."""
    check_delta_rule(Case(kind, dtype, K, V, **dims))


BATCH = {"T": 8197, "B": 2}
SINGLE_SEGMENTS = {"T": 600, "H": 64, "H_v": 128}


@pytest.mark.parametrize(
    ("K", "V", "kind", "dims", "learned", "normalize"),
    [
        (128, 128, "scalar", BATCH, True, True),
        (128, 128, "channel", BATCH, True, True),
        (256, 256, "scalar", BATCH, True, False),
        (128, 128, "scalar", SINGLE_SEGMENTS, True, False),
        (128, 128, "channel", SINGLE_SEGMENTS | {"initial": False}, True, True),
        (256, 128, "none", SINGLE_SEGMENTS, True, True),
        (128, 128, "scalar", DELTA, False, True),
        (128, 256, "scalar", DELTA, False, True),
        (128, 128, "scalar", DELTA, True, False),
        (128, 128, "none", DELTA | {"initial": False}, True, False),
    ],
    ids=str,
)
def test_delta_rule_by_hoppers_own_launches(
    K: int, V: int, kind: str, dims: dict[str, Any], learned: bool, normalize: bool
) -> None:
    """Every way in which Hopper's own launches are taken, and that they are where they can be."""
    delta_launches._launches.cache_clear()
    with patch.object(DeltaLaunches, "_own", autospec=True, side_effect=DeltaLaunches._own) as own:
        check_delta_rule(Case(kind, BF16, K, V, **dims), learned, normalize)
    assert own.called == (devices.takes_gluon() and devices.device_limits(DEVICE).hopper)


def check_delta_rule(case: Case, learned: bool = True, normalize: bool = True) -> None:
    x, d_o, d_final = inputs(case)
    random = torch.Generator("cuda").manual_seed(1)
    beta = torch.rand(case.B, case.T, case.H_v, device="cuda", generator=random)
    x = {"q": x["q"], "k": x["k"], "v": x["v"], "beta": beta} | {name: x[name] for name in list(x)[3:]}
    if not normalize:
        x |= {name: torch.nn.functional.normalize(x[name].float(), dim=-1).to(case.dtype) for name in ("q", "k")}

    def solved(backend: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_(learned or name != "g") for name, t in x.items()}
        o, final = lasp.delta_rule(
            **leaves, output_final_state=True, normalize_qk=normalize, cu_seqlens=case.documents, backend=backend
        )
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad((o, final), list(wanted.values()), (d_o.to(o), d_final.to(final)))
        names = (f"d_{name}" for name in wanted)
        return {"o": o.detach(), "final_state": final.detach()} | dict(zip(names, found, strict=True))

    values = solved("triton", None)
    if "LASP_TEST_PART" in os.environ:
        return
    references = solved("torch", torch.float64)
    bounds = BOUNDS[case.dtype]
    for name, value in values.items():
        bound = bounds.outputs if name in ("o", "final_state") else bounds.gradients
        assert relative_error(value, references[name]) <= bound, name


@pytest.mark.parametrize("heads", [1, 16])  # of which one has the more segments
@pytest.mark.parametrize("kind", ["constant", "scalar", "channel"])
def test_a_write_read_a_million_tokens_later(kind: str, heads: int) -> None:
    """A chunk's decay, or a segment's, rounded as a factor in fp32 would be wrong alike every time: by 9e-5 here."""
    T, D = 1 << 20, 16
    random = torch.Generator().manual_seed(0)
    q, k, v, d_o = (torch.zeros(1, T, heads, D) for _ in range(4))
    for x, token in ((q, -1), (k, 0), (v, 0), (d_o, -1)):
        x[:, token] = torch.randn(heads, D, generator=random)
    rates = -3.0 / T * torch.linspace(1, 0.1, heads)
    shape = {"constant": (heads,), "scalar": (1, T, heads), "channel": (1, T, heads, D)}[kind]
    g = (rates[:, None] if kind == "channel" else rates).expand(shape).contiguous()
    q, k, v, d_o, g = (x.to(DEVICE) for x in (q, k, v, d_o, g))
    leaves = [x.requires_grad_() for x in (k, v)]
    o, final = lasp.linear_attention(q, k, v, g, scale=1.0, output_final_state=True, backend="triton")
    dk, dv = torch.autograd.grad(o, leaves, d_o)
    decay = (rates.double() * (T - 1)).exp().to(DEVICE)[:, None]
    q, k, v, d_o = q[0, -1].double(), k[0, 0].detach().double(), v[0, 0].detach().double(), d_o[0, -1].double()
    far = {
        "o": (o[0, -1], decay * (q * k).sum(1, keepdim=True) * v),
        "final": (final[0], decay[..., None] * k[:, :, None] * v[:, None]),
        "dk": (dk[0, 0], decay * q * (d_o * v).sum(1, keepdim=True)),
        "dv": (dv[0, 0], decay * d_o * (q * k).sum(1, keepdim=True)),
    }
    errors = {name: relative_error(found, expected) for name, (found, expected) in far.items()}
    assert max(errors.values()) < 1e-5, errors
    # The control: one token fewer to decay over, in ten.
    for found, expected in far.values():
        assert relative_error(found, expected * (1 + 3e-5)) > 1e-5
