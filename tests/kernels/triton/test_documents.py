"""Packed documents in the Triton kernels, against the chunked PyTorch backend in fp64, on one device and on ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exchange.simulated import run as simulate
from exchange.simulated import sequence_parallel
from problems import GATES
from tolerances import relative_error
from torch import Tensor

import lasp
from lasp.kernels.triton.decay import intervals, runs
from lasp.kernels.triton.decay import plan as plans

pytestmark = pytest.mark.ci

BOUND = 4e-6
TOKENS, H, K, V = 110, 1, 16, 16
# Empty documents, short ones, one of several segments whose last chunk is ragged; none starts where a chunk would.
BOUNDS = (0, 0, 1, 3, 38, 38, 109, 110)


@pytest.fixture(autouse=True)
def _short_segments(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks a segment, so that few tokens make several; in the interpreter an interval for each chunk, too
    (compiled kernels are not patched: test_gpu has long intervals)."""
    monkeypatch.setattr(runs, "plan", lambda *arguments: plans.plan(*arguments)._replace(segment_chunks=2))
    if device.type == "cpu":
        monkeypatch.setitem(intervals.INTERVALS, torch.float32, (1, 1))


def problem(gate: str, H_v: int = 2) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs in fp32 with a state for each document, and the gradients that come back."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    shapes = {"constant": (H_v,), "scalar": (1, TOKENS, H_v), "channel": (1, TOKENS, H_v, K)}
    x = {"q": normal(1, TOKENS, H, K), "k": normal(1, TOKENS, H, K), "v": normal(1, TOKENS, H_v, V)}
    if gate in shapes:
        x["g"] = -0.05 * torch.rand(shapes[gate], generator=random)
    x["initial_state"] = normal(len(BOUNDS) - 1, H_v, K, V)
    return x, normal(1, TOKENS, H_v, V), normal(len(BOUNDS) - 1, H_v, K, V)


def solve(
    x: dict[str, Tensor],
    d_o: Tensor,
    d_final: Tensor | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs, final states where they have a gradient, and gradients."""
    leaves: dict[str, Any] = {name: tensor.to(device, dtype, copy=True).requires_grad_() for name, tensor in x.items()}
    o, final = lasp.linear_attention(**leaves, output_final_state=d_final is not None, **options)
    if d_final is None:
        o.backward(d_o.to(o))
    else:
        torch.autograd.backward((o, final), (d_o.to(o), d_final.to(final)))
    results = {"o": o.detach()} if final is None else {"o": o.detach(), "final_state": final.detach()}
    results |= {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: result.cpu() for name, result in results.items()}


def expected(x: dict[str, Tensor], d_o: Tensor, d_final: Tensor | None) -> dict[str, Tensor]:
    cpu: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float64}
    return solve(x, d_o, d_final, cu_seqlens=BOUNDS, backend="torch", **cpu)


@pytest.mark.parametrize("gate", GATES)
def test_one_device(gate: str, device: torch.device) -> None:
    x, d_o, d_final = problem(gate)
    references = expected(x, d_o, d_final)
    fused: dict[str, Any] = {"device": device, "dtype": torch.float32, "backend": "triton"}
    values = solve(x, d_o, d_final, cu_seqlens=BOUNDS, **fused)
    errors = {name: relative_error(values[name], references[name]) for name in references}
    assert max(errors.values()) <= BOUND, errors
    # The reference finds these by the same code.
    empty = [0, 4]
    assert torch.equal(values["final_state"][empty], x["initial_state"][empty])
    assert torch.equal(values["d_initial_state"][empty], d_final[empty])


@pytest.mark.parametrize("gate", ["none", "constant"])
def test_one_device_without_states(gate: str, device: torch.device) -> None:
    x, d_o, _ = problem(gate)
    del x["initial_state"]
    references = expected(x, d_o, None)
    values = solve(x, d_o, None, cu_seqlens=BOUNDS, device=device, dtype=torch.float32, backend="triton")
    errors = {name: relative_error(values[name], references[name]) for name in references}
    assert max(errors.values()) <= BOUND, errors


def test_the_check_sees_a_boundary_misplaced_by_a_token(device: torch.device) -> None:
    x, d_o, d_final = problem("scalar")
    references = expected(x, d_o, d_final)
    bounds = (*BOUNDS[:4], 39, 39, *BOUNDS[6:])
    values = solve(x, d_o, d_final, cu_seqlens=bounds, device=device, dtype=torch.float32, backend="triton")
    assert min(relative_error(values[name], references[name]) for name in references) > 1e-2


@pytest.mark.parametrize("gate", GATES)
def test_ranks(gate: str, device: torch.device) -> None:
    """One document over three ranks, one rank without tokens, a border where a document ends."""
    check_ranks((38, 30, 0, 42), device, *problem(gate))


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("with_initial", [False, True])
def test_ranks_without_all_states(gate: str, with_initial: bool, device: torch.device) -> None:
    """No final states, with or without initial ones; ranks that share both their first and their last document."""
    x, d_o, _ = problem(gate)
    if not with_initial:
        del x["initial_state"]
    check_ranks((20, 48, 0, 42), device, x, d_o, None)


def check_ranks(
    lengths: tuple[int, ...], device: torch.device, x: dict[str, Tensor], d_o: Tensor, d_final: Tensor | None
) -> None:
    references = expected(x, d_o, d_final)

    def work(comm) -> dict[str, float]:
        sp = sequence_parallel(comm, "ring", lengths)
        share = None if d_final is None else d_final / sp.size
        local = {n: t if n == "initial_state" or t.dim() == 1 else sp.shard(t) for n, t in x.items()}
        values = solve(
            local, sp.shard(d_o), share, device=device, dtype=torch.float32, sp=sp, cu_seqlens=BOUNDS, backend="triton"
        )  # fmt: skip
        errors = {}
        for name, value in values.items():
            reference = references[name]
            if name == "d_initial_state":
                reference = reference if sp.rank == 0 else torch.zeros_like(reference)
            elif value.dim() == 1:
                value = sp.comm.sum(value)
            elif name != "final_state":
                reference = sp.shard(reference)
            errors[name] = relative_error(value, reference)
        return errors

    for rank, errors in enumerate(simulate(len(lengths), work)):
        assert max(errors.values()) <= BOUND, (rank, errors)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_nan_stays_in_its_document(gate: str, device: torch.device) -> None:
    """The bits of all other documents' outputs, states and gradients are those of the clean run."""
    x, d_o, d_final = problem(gate, H_v=1)
    fused: dict[str, Any] = {"device": device, "dtype": torch.float32, "backend": "triton", "cu_seqlens": BOUNDS}
    clean = solve(x, d_o, d_final, **fused)
    for name in ("q", "k", "v"):
        x[name] = x[name].clone()
        x[name][:, 38:109] = torch.nan
    values = solve(x, d_o, d_final, **fused)
    assert not values["o"][:, 38:109].isfinite().any()
    for name, value in values.items():
        dim = 0 if name in ("final_state", "d_initial_state") else 1
        others = [i for i in range(7) if i != 5] if dim == 0 else [i for i in range(TOKENS) if not 38 <= i < 109]
        index = torch.tensor(others)
        assert torch.equal(value.index_select(dim, index), clean[name].index_select(dim, index)), name
