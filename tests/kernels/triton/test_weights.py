"""Weights of tokens and skips past the recurrence, in the kernels that take them, against PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch
from tolerances import relative_error
from torch import Tensor

import lasp
from lasp.kernels.triton.decay import plan as plans
from lasp.kernels.triton.decay import runs
from lasp.kernels.triton.decay.stages import STAGES
from lasp.recurrence.inputs import DecayInputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BOUNDS = {BF16: 6e-3, FP16: 1.5e-3, FP32: 4e-6}
LEARNED = ("log_weight", "skip", "g", "initial_state")  # in fp32, whatever the others are in


def inputs(T: int, H: int, H_v: int, K: int, V: int, runs: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights from e^-40 to e^2; gates of which some chunks forget all."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x = {"q": normal(1, T, H, K), "k": normal(1, T, H, K), "v": normal(1, T, H_v, V)}
    x = {name: tensor.to(dtype) for name, tensor in x.items()}
    g = -0.1 * torch.rand(1, T, H_v, generator=random)
    g[:, : T // 3, 0] *= 20
    weight = normal(1, T, H_v).clamp(max=2)
    weight[:, ::7] -= 40
    return x | {"g": g, "log_weight": weight, "skip": normal(H_v), "initial_state": normal(runs, H_v, K, V)}


def results(
    x: dict[str, Tensor], dtype: torch.dtype, backend: str, documents: list[int] | None, begins: bool
) -> dict[str, Tensor]:
    """Outputs and all gradients, for gradients of the outputs that are the same for all, of `dtype`."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in x.items()}
    ways = {name: leaves[name] for name in LEARNED if name in leaves} | {"cu_seqlens": documents, "backend": backend}
    if begins:
        pending = lasp.linear_attention_begin(leaves["k"], leaves["v"], **ways, output_final_state=True)  # type: ignore[arg-type]
        outputs = pending.finish(leaves["q"])
    else:
        given = (leaves[name] for name in "qkv")
        outputs = lasp.linear_attention(*given, **ways, output_final_state=True)  # type: ignore[arg-type, assignment]
    random = torch.Generator().manual_seed(1)
    d = [torch.randn(t.shape, generator=random).to(dtype).to(t) for t in outputs]  # type: ignore[union-attr]
    found = torch.autograd.grad(outputs, list(leaves.values()), d)  # type: ignore[arg-type]
    named = {"o": outputs[0].detach(), "final": outputs[1].detach()}  # type: ignore[union-attr]
    return named | {f"d_{name}": t for name, t in zip(leaves, found, strict=True)}


def errors(x: dict[str, Tensor], expected: dict[str, Tensor], device: torch.device, *ways: object) -> dict[str, float]:
    given = {name: tensor.to(device) for name, tensor in x.items()}
    found = results(given, x["v"].dtype, "triton", *ways)  # type: ignore[arg-type]
    assert all(found[f"d_{name}"].dtype == tensor.dtype for name, tensor in x.items())
    return {name: relative_error(found[name].cpu(), tensor) for name, tensor in expected.items()}


Shape = tuple[int, int, int, int, int]


@pytest.mark.parametrize(
    ("dtype", "shape", "documents", "from_zero", "begins"),
    [
        (BF16, (200, 1, 2, 16, 24), None, False, False),
        (BF16, (150, 2, 4, 16, 64), [0, 20, 20, 130, 150], True, True),  # two heads a program for dq and dk
        (BF16, (390, 1, 4, 16, 64), None, False, False),
        (FP16, (150, 1, 2, 16, 16), None, True, False),
        (FP32, (70, 1, 2, 16, 16), None, False, True),  # of values weighed before
    ],
)
def test_weights_and_skips(
    dtype: torch.dtype,
    shape: Shape,
    documents: list[int] | None,
    from_zero: bool,
    begins: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compare runs in rows and in columns, from summaries and gathered; the controls: weights of another token, another
    head's skip."""

    def short(*arguments: object) -> plans.LaunchPlan:
        p = plans.plan(*arguments)  # type: ignore[arg-type]
        return p if p.gathers else p._replace(segment_chunks=2, segments=-(-p.chunks // 2))

    monkeypatch.setattr(runs, "plan", short)
    monkeypatch.setattr(runs, "launches_of", runs.launches_of.__wrapped__)
    x = inputs(*shape, 1 if documents is None else len(documents) - 1, dtype)
    if from_zero:
        del x["initial_state"]
    assert STAGES.weighs is not None
    assert STAGES.weighs(DecayInputs(x["q"], x["k"], x["v"], x["g"], 1.0)) == (dtype != FP32)
    expected = results({name: tensor.double() for name, tensor in x.items()}, dtype, "torch", documents, False)
    found = errors(x, expected, device, documents, begins)
    assert max(found.values()) <= BOUNDS[dtype], found
    if dtype == BF16 and documents is None:
        x["log_weight"] = x["log_weight"].roll(1, 1)
        moved = errors(x, expected, device, documents, begins)
        assert min(moved[name] for name in ("o", "final", "d_q", "d_k", "d_v", "d_g", "d_log_weight")) > 0.1, moved
        x["log_weight"], x["skip"] = x["log_weight"].roll(-1, 1), x["skip"].roll(1)
        moved = errors(x, expected, device, documents, begins)
        assert min(moved["o"], moved["d_v"]) > 0.1 >= 10 * moved["d_log_weight"], moved
