"""The Triton kernels of the delta rule, through the public operator, against the PyTorch backend in fp64.

The interpreter takes milliseconds a program, so shapes are the smallest that reach every branch: several segments,
a ragged last chunk, grouped heads, dims that are no power of two, several slices of columns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import triton.language as tl
from exchange.simulated import run as simulate
from exchange.simulated import sequence_parallel
from tolerances import relative_error
from torch import Tensor
from torch.nn.functional import normalize

import lasp
from lasp.kernels.triton.delta import chunk, launches
from lasp.recurrence.documents import documents_here

GATES = ("none", "scalar", "channel")
# fp32: a triangular system a chunk costs digits that sums do not. 16 bits: the policy's, for outputs and gradients.
BOUNDS = {torch.float32: (2e-6, 2e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (5e-3, 8e-3)}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    gate: str
    dtype: torch.dtype = FP32
    B: int = 1
    T: int = 100
    H: int = 1
    H_v: int = 2
    K: int = 16
    V: int = 16
    beta: float = 2.0
    strongest: float = 0.1
    initial: bool = True
    normalize: bool = False
    documents: tuple[int, ...] | None = None
    erases: bool = False  # with a key of its own


class DeltaProblem(NamedTuple):
    x: dict[str, Tensor]
    d_o: Tensor
    d_final: Tensor
    options: dict[str, Any]


def problem(case: Case) -> DeltaProblem:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    _, dtype, B, T, H, H_v, K, V, *_ = case
    k = normal(B, T, H, K)
    q, k, v = normal(B, T, H, K), k if case.normalize else normalize(k, dim=-1), normal(B, T, H_v, V)
    x = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    x["beta"] = case.beta * torch.rand(B, T, H_v, generator=random)
    shape = {"none": None, "scalar": (B, T, H_v), "channel": (B, T, H_v, K)}[case.gate]
    if shape is not None:
        x["g"] = -case.strongest * torch.rand(shape, generator=random)
    if case.erases:
        x["erase_key"] = 0.7 * x["k"].roll(1, 1) + 0.2 * x["k"]
    states = (B if case.documents is None else len(case.documents) - 1, H_v, K, V)
    if case.initial:
        x["initial_state"] = normal(*states)
    options = {"normalize_qk": case.normalize, "cu_seqlens": case.documents}
    return DeltaProblem(x, normal(B, T, H_v, V).to(dtype), normal(*states), options)


def solve(p: DeltaProblem, device: torch.device, backend: str = "triton", exact: bool = False) -> dict[str, Tensor]:
    """Outputs, final state and all gradients."""
    leaves: dict[str, Any] = {
        name: tensor.to(device, torch.float64 if exact else tensor.dtype, copy=True).requires_grad_()
        for name, tensor in p.x.items()
    }
    o, final = lasp.delta_rule(**leaves, output_final_state=True, backend=backend, **p.options)
    torch.autograd.backward((o, final), (p.d_o.to(o), p.d_final.to(final)))
    results = {"o": o.detach(), "final_state": final.detach()}
    results |= {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: result.cpu() for name, result in results.items()}


def errors_of(values: dict[str, Tensor], references: dict[str, Tensor]) -> dict[str, float]:
    """Errors, a gate's gradient's head by head, token by token and summed: one that forgets has a small one."""
    assert values.keys() == references.keys()
    errors = {name: relative_error(values[name], references[name]) for name in values}
    if "d_g" in values:
        heads = zip(values["d_g"].double().unbind(2), references["d_g"].unbind(2), strict=True)
        errors["d_g of a head"] = max(relative_error(found, expected) for found, expected in heads)
    return errors


def check(case: Case, device: torch.device) -> None:
    check_problem(problem(case), case.dtype, device)


def check_problem(p: DeltaProblem, dtype: torch.dtype, device: torch.device) -> None:
    errors = errors_of(solve(p, device), solve(p, torch.device("cpu"), "torch", exact=True))
    outputs, gradients = BOUNDS[dtype]
    bad = {n: e for n, e in errors.items() if e > (outputs if n in ("o", "final_state") else gradients)}
    assert not bad, errors


@pytest.fixture(name="short_segments")
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks a segment, so that few tokens make several; and tensor descriptors, which bf16 inputs have."""
    plan = launches.delta_plan

    def short(*arguments: Any) -> Any:
        p = plan(*arguments)
        cut: dict[str, Any] = {"segment_chunks": 2, "segments": max(1, -(-p.chunks // 2)), "operand_chunks": 8}
        return p._replace(**cut, descriptors=True, stores=True)

    monkeypatch.setattr(launches, "delta_plan", short)
    monkeypatch.setattr(launches, "_launches", launches._launches.__wrapped__)


@pytest.mark.parametrize("gate", GATES)
def test_all_results_fp32(gate: str, device: torch.device, short_segments: None) -> None:
    check(Case(gate), device)


@pytest.mark.parametrize("gate", GATES)
def test_single_segments_of_normalized_keys(gate: str, device: torch.device) -> None:
    """Grouped heads, several slices of odd dims; of a gate per channel, strong ones."""
    check(Case(gate, T=40, B=2, K=20, V=36, strongest=5.0, initial=False, normalize=True), device)


@pytest.mark.parametrize("gate", GATES)
def test_all_results_bf16(gate: str, device: torch.device, short_segments: None) -> None:
    check(Case(gate, BF16, T=200, K=64, beta=1.0), device)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_strong_gates_bf16(gate: str, device: torch.device, short_segments: None) -> None:
    """Down to -20, so that of a gate per channel no chunk is bounded; and values that are cut into two heads."""
    check(Case(gate, BF16, T=70, H=2, V=192, beta=1.0, strongest=20.0, normalize=True), device)


@pytest.mark.parametrize("T", [5, 70])
def test_gates_that_are_all_strong_bf16(T: int, device: torch.device) -> None:
    """Each token forgets nearly all, one head all: its gate's gradient is of what crosses it, and that is next to
    nothing."""
    p = problem(Case("channel", BF16, T=T, K=64, V=64, beta=1.0))
    p.x["g"] = -12.0 - 6.0 * torch.rand(p.x["g"].shape, generator=torch.Generator().manual_seed(1))
    p.x["g"][:, :, 1] = -torch.inf
    found, exact = solve(p, device)["d_g"], solve(p, torch.device("cpu"), "torch", exact=True)["d_g"]
    assert relative_error(found[:, :, 0], exact[:, :, 0]) < 8e-3
    assert not exact[:, :, 1].any() and found[:, :, 1].abs().max() < 1e-30


@pytest.mark.parametrize("gate", GATES)
def test_an_erase_key_bf16(gate: str, device: torch.device, short_segments: None) -> None:
    """Covers grouped heads, which share it; bounded gates per channel beside strong ones; values that are cut."""
    p = problem(Case(gate, BF16, T=100, V=260, beta=1.0, erases=True))
    if gate == "channel":
        p.x["g"][:, 64:] *= 100
    check_problem(p, BF16, device)


@pytest.mark.parametrize("documents", [None, (0, 1, 66, 130)])
def test_states_in_the_place_of_gradients(
    documents: tuple[int, ...] | None, device: torch.device, short_segments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S and D of chunks lie where their programs write gradients, but for chunks that are not full: the same bits as in
    memory of their own. Some chunks are bounded, some are not."""
    p = problem(Case("channel", BF16, T=130, H_v=1, K=128, V=128, beta=1.0, normalize=True, documents=documents))
    p.x["g"][:, 64:] *= 100
    init, seen = launches.DeltaLaunches.__init__, []

    def made(self: launches.DeltaLaunches, *arguments: Any) -> None:
        init(self, *arguments)
        seen.append(self.placed)
        self.placed = self._known["PLACED"] = len(seen) == 1

    monkeypatch.setattr(launches.DeltaLaunches, "__init__", made)
    placed = solve(p, device)
    if documents is not None:  # launches are kept with them
        documents_here(documents, 0, 130).layouts.clear()
    assert max(errors_of(placed, solve(p, device)).values()) == 0 and seen == [True, True]


@pytest.mark.parametrize("gate", ["none", "channel"])
def test_all_results_fp16(gate: str, device: torch.device) -> None:
    check(Case(gate, FP16, T=70), device)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("gate", GATES)
def test_hardly_any_tokens(gate: str, tokens: int, device: torch.device) -> None:
    check(Case(gate, T=tokens), device)


def test_beta_of_zero_and_two(device: torch.device) -> None:
    """A token whose beta is zero changes nothing, and its beta has a gradient; of a mask of zeros, too. It writes 2^-50
    of what it would, to rounding, and of twice that it is not: the control."""
    p = problem(Case("scalar", T=40, initial=False))
    for beta, expected in ((0.0, 0.0), (2.0, 1.0)):
        p.x["beta"].fill_(beta)
        values, references = solve(p, device), solve(p, torch.device("cpu"), "torch", exact=True)
        assert relative_error(values["d_beta"], references["d_beta"]) <= 2e-6
        assert values["o"].abs().max() <= expected * 100 + 1e-12
        for least, fits in ((2.0**-50, True), (2.0**-49, beta == 2)):
            seen = p._replace(x=p.x | {"beta": p.x["beta"].clamp(min=least)})
            assert (
                max(errors_of(values, solve(seen, torch.device("cpu"), "torch", exact=True)).values()) <= 2e-6
            ) == fits


def test_first_token_has_no_gate_gradient(device: torch.device) -> None:
    """The first decay acts on no state: exactly, not but for rounding."""
    for gate in ("scalar", "channel"):
        p = problem(Case(gate, T=40, initial=False, documents=(0, 1, 8, 40)))
        found = solve(p, device)["d_g"]
        assert torch.count_nonzero(found[:, [0, 1, 8]]) == 0 and torch.count_nonzero(found[:, 2]) > 0


DOCUMENTS = (0, 0, 1, 3, 38, 38, 79, 80)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("single", [False, pytest.param(True, marks=pytest.mark.ci)])
def test_packed_documents(gate: str, single: bool, device: torch.device, request: pytest.FixtureRequest) -> None:
    if not single:
        request.getfixturevalue("short_segments")
    check(Case(gate, T=80, documents=DOCUMENTS), device)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("documents", "erases"),
    [
        pytest.param(None, False, marks=pytest.mark.ci),
        pytest.param(DOCUMENTS, False, marks=pytest.mark.ci),
        (DOCUMENTS, True),
    ],
)
def test_ranks(
    gate: str, documents: tuple[int, ...] | None, erases: bool, device: torch.device, short_segments: None
) -> None:
    """Three ranks, and one without tokens: the exchange carries states and transitions."""
    p = problem(Case(gate, T=80, documents=documents, erases=erases, beta=1.0 if erases else 2.0))
    references = solve(p, torch.device("cpu"), "torch", exact=True)
    lengths = (38, 30, 0, 12)

    def work(comm: Any) -> dict[str, float]:
        sp = sequence_parallel(comm, "ring", lengths)
        whole = ("initial_state",)
        local = {name: t if name in whole else sp.shard(t) for name, t in p.x.items()}
        shard = DeltaProblem(local, sp.shard(p.d_o), p.d_final / sp.size, p.options | {"sp": sp})
        own = {n: t if n in ("final_state", "d_initial_state") else sp.shard(t) for n, t in references.items()}
        own["d_initial_state"] = own["d_initial_state"] * (sp.rank == 0)
        values = solve(shard, device)
        return {name: relative_error(values[name], own[name]) for name in own}

    for rank, errors in enumerate(simulate(len(lengths), work)):
        assert max(errors.values()) <= 4e-6, (rank, errors)


@pytest.mark.parametrize(
    ("name", "bad"), [("g", 0.1), ("g", float("nan")), ("beta", -0.1), ("beta", 2.1), ("beta", float("nan"))]
)
def test_what_is_no_decay_or_beta_gives_nan(name: str, bad: float, device: torch.device) -> None:
    """NaN stands in its head, from its chunk on."""
    from lasp.kernels.triton.delta.stages import STAGES
    from lasp.recurrence.inputs import DeltaInputs

    p = problem(Case("scalar", T=100, initial=False))
    p.x[name][0, 40, 1] = bad
    q, k, v, beta, g = (p.x[tensor].to(device) for tensor in ("q", "k", "v", "beta", "g"))
    x = STAGES.prepare(DeltaInputs(q, k, v, beta, g, 1.0), True)
    segments = STAGES.unsummarized.totals(x)
    o, saved = STAGES.outputs(x, segments, STAGES.local_outputs(x, segments), None)
    finite, state = o.isfinite(), STAGES.unsummarized.leaving(saved)
    assert finite[:, :, 0].all() and finite[:, :32].all() and not finite[:, 40:, 1].any()
    assert state[:, 0].isfinite().all() and not state[:, 1].isfinite().any()


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("documents", [None, pytest.param(DOCUMENTS, marks=pytest.mark.ci)])
def test_what_is_forgotten_is_not_walked(
    documents: tuple[int, ...] | None, device: torch.device, short_segments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as of sweeps over all chunks, of a head that forgets within one beside one that does not; what is
    left out does not show even as NaN. With too much left out they differ."""
    p = problem(Case("scalar", T=80 if documents else 165, strongest=16.0, documents=documents))
    p.x["g"][..., 1] *= 1e-3
    found = solve(p, device)
    values = p.x["v"].clone()
    if documents is None:
        p.x["v"][0, 3, 0] = float("nan")
        last = solve(p, device)
        assert torch.equal(last["final_state"][:, 0], found["final_state"][:, 0])
        assert torch.equal(last["d_g"][0, 130:, 0], found["d_g"][0, 130:, 0])
    for bits, equal in ((-1e30, True), (-1e-3, False)):
        p.x["v"].copy_(values)
        if device.type == "cpu":  # a compiled kernel keeps the number that it was compiled with
            monkeypatch.setattr(chunk, "FORGOTTEN", tl.constexpr(bits))
            assert same_bits(solve(p, device), found) == equal


def test_what_grows_is_not_forgotten(device: torch.device, short_segments: None) -> None:
    """Keys too long for their betas: each token turns the state around, and what the gate takes, it gives."""
    p = problem(Case("scalar", T=140, beta=1.0, H_v=1))
    p.x["k"][:] = 65**0.5 * p.x["k"][:, :1]
    p.x["beta"][:], p.x["g"][:] = 1.0, -math.log(64)
    errors = errors_of(solve(p, device), solve(p, torch.device("cpu"), "torch", exact=True))
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("over_ranks", [False, True])
def test_what_is_saved_is_foretold(gate: str, over_ranks: bool, device: torch.device, short_segments: None) -> None:
    """Compiled graphs ask for it: every tensor's shape and dtype."""
    from lasp.kernels.triton.delta.stages import STAGES, empty_saved
    from lasp.recurrence.inputs import DeltaInputs

    p = problem(Case(gate, BF16, K=24, V=40, T=130))
    q, k, v, beta = (p.x[name].to(device) for name in ("q", "k", "v", "beta"))
    given = DeltaInputs(q, k, v, beta, p.x["g"].to(device) if gate != "none" else None, 1.0, None, True)
    x, state = STAGES.prepare(given, False), p.x["initial_state"].to(device)
    segments = STAGES.summarize(x)[1] if over_ranks else STAGES.unsummarized.totals(x)
    _, saved = STAGES.outputs(x, segments, STAGES.local_outputs(x, segments), state)
    foretold = empty_saved(given, True, over_ranks, False)
    assert [(t.shape, t.dtype) for t in saved] == [(t.shape, t.dtype) for t in foretold]


@pytest.mark.parametrize("mistake", ["no state", "later gate", "less beta"])
def test_the_check_sees(mistake: str, device: torch.device) -> None:
    p = problem(Case("scalar", T=40, strongest=0.05))
    references = solve(p, torch.device("cpu"), "torch", exact=True)
    name = {"no state": "initial_state", "later gate": "g", "less beta": "beta"}[mistake]
    p.x[name] = {"no state": 0.0 * p.x[name], "later gate": p.x["g"].roll(1, 1), "less beta": 0.99 * p.x["beta"]}[
        mistake
    ]
    assert min(errors_of(solve(p, device), references)[n] for n in ("o", "d_q", "d_k")) > 100 * BOUNDS[FP32][0]


def test_rounding_of_what_crosses_no_gate_is_not_summed(device: torch.device) -> None:
    """Gates per channel that forget all but a few times, beside the gradient of a final state: what each token adds to
    that crosses no gate, and is far larger than what does."""
    p = problem(Case("channel", T=16, H_v=4, K=64, V=2, strongest=50.0))
    found, expected = solve(p, device)["d_g"], solve(p, torch.device("cpu"), "torch", exact=True)["d_g"]

    def worst(found: Tensor) -> float:
        sums = zip(found.double().sum(1).unbind(1), expected.sum(1).unbind(1), strict=True)
        return max(relative_error(*pair) for pair in sums)

    assert worst(found) < 2e-6
    # The control: a few roundings, the same at all tokens of a chunk.
    assert worst(found + 8 * torch.finfo(FP32).eps * expected.abs().amax(1, keepdim=True)) > 2e-6


@pytest.mark.parametrize("keys", [2, 300])
def test_what_the_kernels_do_not_take(keys: int, device: torch.device) -> None:
    p = problem(Case("none", T=3, K=keys))
    with pytest.raises(ValueError, match=f"does not take K = {keys} here: .*backend='torch'"):
        solve(p, device)
