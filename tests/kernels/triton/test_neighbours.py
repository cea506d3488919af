"""The fused kernels of what stands around recurrences, against the same in PyTorch in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exchange.simulated import run as simulate
from exchange.simulated import sequence_parallel
from tolerances import relative_error
from torch import Tensor

import lasp
from lasp.halo import functions as halo
from lasp.halo.fused import ALONE, convolution
from lasp.kernels.triton.neighbours import launches
from lasp.layers import LayerContext, mixer
from lasp.layers import fused as layers
from lasp.layers.mamba2 import Mamba2
from lasp.ops.autograd import TRACEABLE

BOUNDS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: dict[str, Tensor], dtype: Any) -> Any:
    """Outputs and all gradients, for gradients of the outputs that are the same for all."""
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    d_outputs = [normal(*y.shape, seed=n).to(y) for n, y in enumerate(outputs)]
    found = torch.autograd.grad(outputs, list(leaves.values()), d_outputs)
    named = {f"output {n}": y.detach() for n, y in enumerate(outputs)}
    return named | {f"d_{name}": d for name, d in zip(leaves, found, strict=True)}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    errors = {name: relative_error(found[name].cpu(), expected[name]) for name in expected}
    assert max(errors.values()) <= bound, errors


def rounded(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype).double() for name, tensor in inputs.items()}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the kernels, which here may be interpreted."""
    for module in (halo, layers):
        monkeypatch.setattr(module, "has_fused_kernels", lambda device, dtype: dtype != torch.float64)


def inputs_of_convolution(B: int = 2, T: int = 13, C: int = 72, W: int = 4, bias: bool = True) -> dict[str, Tensor]:
    found = {"x": normal(B, T, C), "weight": normal(C, W, seed=1), "initial_state": normal(B, C, W - 1, seed=2)}
    return found | ({"bias": normal(C, seed=3)} if bias else {})


@pytest.mark.parametrize(
    ("activation", "dtype", "T", "W", "bias"),
    [
        ("silu", FP32, 37, 4, True),
        (None, BF16, 20, 2, False),
        ("silu", BF16, 9, 4, True),
        ("silu", FP16, 2, 3, True),
        (None, FP32, 5, 1, True),
    ],
)
def test_convolution(
    activation: str | None, dtype: torch.dtype, T: int, W: int, bias: bool, fused: None, device: torch.device
) -> None:
    def convolve(**x: Tensor) -> tuple[Tensor, ...]:
        return lasp.short_convolution(**x, activation=activation, output_final_state=True)  # type: ignore[arg-type, return-value]

    inputs = inputs_of_convolution(T=T, W=W, bias=bias)
    found = results(convolve, {n: t.to(device) for n, t in inputs.items()}, dtype)
    compare(found, results(convolve, rounded(inputs, dtype), torch.float64), BOUNDS[dtype])


def test_convolution_of_a_slice_without_what_came_before(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of a wider tensor are read where they lie; over several programs' tokens; in three parts."""
    monkeypatch.setattr(launches, "LENGTH", 4)
    monkeypatch.setattr(launches, "CHANNELS", 16)
    launches._convolution.cache_clear()
    wide, weight = normal(2, 70, 160).to(device, FP32), normal(72, 4, seed=1).to(device, FP32)
    x = wide[..., 16:88]

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        parts = convolution(x, weight, None, None, None, ALONE, True, [40, 24, 8])
        assert all(part.is_contiguous() for part in parts)
        return torch.cat(parts, 2)

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return lasp.short_convolution(x, weight, activation="silu")[0]

    assert not x.is_contiguous()
    # Columns behind them pass.
    beside = convolution(wide[..., 16:90], weight, None, None, None, ALONE, True, [40, 24, 8])
    assert torch.equal(beside.pop(), wide[..., 88:90]) and torch.equal(torch.cat(beside, 2), convolve(x, weight))
    found = convolve(x, weight)
    expected = exact(x.cpu().double(), weight.cpu().double())
    assert relative_error(found.cpu(), expected) <= 2e-6 and relative_error(found.cpu().roll(1, 1), expected) > 0.1
    given = {"x": x.cpu(), "weight": weight.cpu()}
    own = results(convolve, {n: t.to(device) for n, t in given.items()}, FP32)
    compare(own, results(exact, rounded(given, FP32), torch.float64), 2e-6)


DOCUMENTS = (0, 1, 9, 9, 20, 24)


@pytest.mark.parametrize(("documents", "states"), [(None, True), (DOCUMENTS, True), (DOCUMENTS, False)])
def test_convolution_over_ranks(
    documents: tuple[int, ...] | None,
    states: bool,
    fused: None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows from several ranks before, one shorter than the width, one empty; several programs' tokens."""
    monkeypatch.setattr(launches, "INTERVALS", 2)
    monkeypatch.setattr(launches, "LENGTH", 4)
    launches._convolution.cache_clear()
    inputs = inputs_of_convolution(B=1, T=24, C=16)
    lengths = (11, 2, 0, 11)
    if documents is not None:
        inputs["initial_state"] = normal(len(documents) - 1, 16, 3, seed=2)
    if not states:
        del inputs["initial_state"]

    def convolve(**x: Any) -> Tensor:
        y, _ = lasp.short_convolution(**x, activation="silu", cu_seqlens=documents)
        return y

    expected = results(convolve, rounded(inputs, FP32), torch.float64)

    def work(comm: Any) -> dict[str, Tensor]:
        sp = sequence_parallel(comm, "ring", lengths)
        local = {name: (sp.shard(t) if name == "x" else t).to(device, FP32) for name, t in inputs.items()}
        leaves = {name: t.requires_grad_() for name, t in local.items()}
        y = convolve(**leaves, sp=sp)
        d_y = sp.shard(normal(1, 24, 16)).to(y)
        found = torch.autograd.grad(y, list(leaves.values()), d_y)
        return {"output 0": y.detach()} | {f"d_{n}": d for n, d in zip(leaves, found, strict=True)}

    parts = simulate(len(lengths), work)
    found = {name: torch.cat([part[name] for part in parts], 1) for name in ("output 0", "d_x")}
    found |= {name: sum(part[name] for part in parts) for name in expected if name not in found}
    compare(found, expected, 2e-6)


def test_documents_seen_while_generating_serve_training_and_wrong_ones_are_refused(
    fused: None, device: torch.device
) -> None:
    """Eager and in a graph, which looks at them when it runs."""
    x, weight = normal(1, 13, 16).to(device, FP32).requires_grad_(), normal(16, 4, seed=1).to(device, FP32)

    def convolve(x: Tensor, documents: Tensor) -> Tensor:
        return lasp.short_convolution(x, weight.requires_grad_(), cu_seqlens=documents)[0]

    torch._dynamo.reset()
    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        seen = convolve(x, torch.tensor([0, 4, 13]))
    for run in (convolve, compiled):
        y = run(x, torch.tensor([0, 4, 13]))
        y.sum().backward()
        assert torch.equal(y, seen)
        for wrong in ([0, 4, 14], [0, 4, 12], [1, 4, 13], [0, 14, 13], [-1, 4, 13]):
            with pytest.raises(ValueError, match="must rise from 0 to the 13 tokens"):
                run(x, torch.tensor(wrong))
        with pytest.raises(ValueError, match="batch must be 1"):
            run(x.repeat(2, 1, 1), torch.tensor([0, 4, 13]))


@pytest.mark.parametrize("first", [0, 4, 12])
def test_nan_stays_in_its_document(first: int, fused: None, device: torch.device) -> None:
    """It is in one of three, of which the last has a single token: outputs and gradients of the others have none."""
    documents = (0, 4, 12, 13)
    x, weight = normal(1, 13, 16).to(device, FP32), normal(16, 4, seed=1).to(device, FP32)
    own = torch.zeros(13, dtype=torch.bool)
    own[first : documents[documents.index(first) + 1]] = True
    x[:, own.to(device)] = torch.nan
    y = lasp.short_convolution(x.requires_grad_(), weight, activation="silu", cu_seqlens=documents)[0]
    (d_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for tensor in (y, d_x):
        assert torch.equal(tensor.isnan().any(-1)[0].cpu(), own)


def test_a_tap_in_another_place_shows(fused: None, device: torch.device) -> None:
    inputs = inputs_of_convolution()

    def convolve(**x: Tensor) -> Tensor:
        return lasp.short_convolution(**x, activation="silu")[0]  # type: ignore[arg-type]

    expected = results(convolve, rounded(inputs, FP32), torch.float64)
    inputs["weight"] = inputs["weight"].roll(1, 1)
    found = results(convolve, {n: t.to(device) for n, t in inputs.items()}, FP32)
    assert min(relative_error(found[n].cpu(), expected[n]) for n in ("output 0", "d_x", "d_weight")) > 0.1


def inputs_of_norm(*, heads: int, channels: int, per_channel: bool, gate: bool) -> dict[str, Tensor]:
    found = {"o": normal(2, 11, heads, channels), "gain": normal(heads * channels if per_channel else channels, seed=1)}
    return found | ({"gate": normal(2, 11, heads * channels, seed=2)} if gate else {})


@pytest.mark.parametrize(
    ("dtype", "activation", "gate"), [(FP32, "silu", True), (FP32, "none", False), (BF16, "sigmoid", True)]
)
def test_gated_norm(dtype: torch.dtype, activation: str, gate: bool, fused: None, device: torch.device) -> None:
    def norm(o: Tensor, gain: Tensor, gate: Tensor | None = None) -> Tensor:
        return layers.gated_norm(o, gate, gain, activation=activation, eps=1e-5)

    inputs = inputs_of_norm(heads=3, channels=40, per_channel=False, gate=gate)
    found = results(norm, {n: t.to(device) for n, t in inputs.items()}, dtype)
    compare(found, results(norm, rounded(inputs, dtype), torch.float64), BOUNDS[dtype])


@pytest.mark.parametrize(("dtype", "groups"), [(FP32, 1), (FP32, 2), (BF16, 1)])
def test_norm_of_what_is_gated(
    dtype: torch.dtype, groups: int, fused: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are summed by several programs, of several rows one after another."""
    monkeypatch.setattr(launches, "ELEMENTS", 64)
    monkeypatch.setattr(launches, "SUMMED", 3 * 64)
    launches._gated_norm.cache_clear()

    def norm(**x: Tensor) -> Tensor:
        return layers.norm_of_gated(**x, groups=groups, eps=1e-5)

    inputs = inputs_of_norm(heads=4, channels=10, per_channel=True, gate=True)
    found = results(norm, {n: t.to(device) for n, t in inputs.items()}, dtype)
    expected = results(norm, rounded(inputs, dtype), torch.float64)
    compare(found, expected, BOUNDS[dtype])
    inputs["gain"] = inputs["gain"].roll(1)
    moved = results(norm, {n: t.to(device) for n, t in inputs.items()}, dtype)
    assert min(relative_error(moved[n].cpu(), expected[n]) for n in ("output 0", "d_gate", "d_o")) > 0.1


@pytest.mark.parametrize(("dtype", "first"), [(FP32, True), (BF16, True), (FP32, False), (BF16, False)])
def test_a_norm_before_a_projection(dtype: torch.dtype, first: bool, fused: None, device: torch.device) -> None:
    """The weight's gradient is of the norm's output, which is not kept; the control: of another token's. With the gate
    first, and last."""

    def project(**x: Tensor) -> Tensor:
        if first:
            return layers.project_norm_of_gated(**x, groups=1, eps=1e-5)
        return layers.project_gated_norm(**x, activation="silu", eps=1e-5)

    inputs = inputs_of_norm(heads=4, channels=10, per_channel=first, gate=True) | {"weight": normal(6, 40, seed=6)}
    found = results(project, {n: t.to(device) for n, t in inputs.items()}, dtype)
    expected = results(project, rounded(inputs, dtype), torch.float64)
    compare(found, expected, 1.5 * BOUNDS[dtype])
    inputs["o"] = inputs["o"].roll(1, 1)
    moved = results(project, {n: t.to(device) for n, t in inputs.items()}, dtype)
    assert relative_error(moved["d_weight"].cpu(), expected["d_weight"]) > 0.1


@pytest.mark.parametrize(("dtype", "bound"), [(FP32, 4e-6), (BF16, 2e-2)])
def test_all_of_a_layer(
    dtype: torch.dtype, bound: float, fused: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare a layer whose projection comes in parts, of which the steps pass the convolution; the control: steps of
    another token."""
    config = Mamba2.Config(num_heads=4, key_dim=16, value_dim=16, num_key_heads=1)
    torch.manual_seed(0)
    exact = config.build(LayerContext(24, backend="torch")).double()
    x, d_y = rounded({"x": normal(1, 70, 24)}, dtype)["x"], normal(1, 70, 24)

    def results_of(layer: Any, x: Tensor) -> dict[str, Tensor]:
        leaves = {"x": x.detach().requires_grad_(), **dict(layer.named_parameters())}
        y = layer(leaves["x"])[0]
        found = torch.autograd.grad(y, list(leaves.values()), d_y.to(y))
        named = {"y": y.detach()} | {f"d_{name}": d for name, d in zip(leaves, found, strict=True)}
        return named | {"d_steps": named["d_in_proj.weight"][-4:]}

    layer = config.build(LayerContext(24, backend="triton")).to(device, dtype)
    with torch.no_grad():
        for mine, other in zip(layer.parameters(), exact.parameters(), strict=True):
            other.copy_(other.to(mine.dtype))
            mine.copy_(other)
    expected = results_of(exact, x)
    compare(results_of(layer, x.to(device, dtype)), expected, bound)

    def mixed_up(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        mixed, z = project(self, x)
        return torch.cat((mixed[..., :-4], mixed[..., -4:].roll(1, 1)), -1), z

    project = Mamba2.project
    monkeypatch.setattr(Mamba2, "project", mixed_up)
    moved = results_of(layer, x.to(device, dtype))
    assert relative_error(moved["d_steps"].cpu(), expected["d_steps"]) > 0.1


@pytest.mark.ci
def test_a_layer_compiles_whole(fused: None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused neighbours are part of its graph, gradients the eager ones; what they make of a projection, and a
    recurrence reads, is not kept. The control: a layer of which only the end runs again."""
    monkeypatch.setattr(mixer, "has_fused_kernels", lambda device, dtype: True)
    config = Mamba2.Config(num_heads=2, key_dim=16, value_dim=16, num_key_heads=1)
    torch.manual_seed(0)
    layer = config.build(LayerContext(24, backend="triton")).to(device)
    x = normal(1, 64, 24).to(device, FP32).requires_grad_()
    leaves = [x, *layer.parameters()]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    eager = layer(x)[0]
    expected, kept = gradients(eager), []
    for recomputes in (True, False):
        monkeypatch.setattr(type(layer), "recomputes", recomputes)
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch._dynamo.reset()
        run = torch.compile(layer, fullgraph=TRACEABLE, backend="aot_eager_decomp_partition")
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            compiled = run(x)[0]
        kept.append(sum(sizes.values()))
        for got, reference in zip((compiled, *gradients(compiled)), (eager, *expected), strict=True):
            assert relative_error(got, reference) <= 2e-6
    inner, convolved = config.num_heads * config.value_dim, config.convolved
    assert kept[1] - kept[0] >= 0.95 * 4 * x.shape[1] * (inner + convolved)
