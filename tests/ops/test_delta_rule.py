"""The delta rule on one device and across ranks: chunked against token by token, its laws, its messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from exchange.simulated import run as simulate
from exchange.simulated import sequence_parallel
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative_error, worst
from torch import Tensor
from torch.nn.functional import normalize
from world import run

import lasp
from lasp.exchange import EXCHANGES
from lasp.kernels.fla.library import check_triton

GATES = ("none", "scalar", "channel")
# Relative errors against the fp64 reference; a triangular system a chunk costs digits that sums do not.
FP64, FP32 = 1e-10, 1e-5


def make(
    gate: str,
    *,
    batch: int = 2,
    tokens: int = 37,
    heads: int = 2,
    value_heads: int = 2,
    keys: int = 5,
    values: int = 3,
    slow: float = 0.02,
    beta: tuple[float, float] = (0.0, 2.0),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random inputs and output gradients in fp64. Decays are slow, so that what comes from far still counts."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64)

    run_shape = (batch, tokens, value_heads)
    problem = {
        "q": normal(batch, tokens, heads, keys),
        "k": normalize(normal(batch, tokens, heads, keys), dim=-1),
        "v": normal(*run_shape, values),
        "beta": beta[0] + (beta[1] - beta[0]) * uniform(*run_shape),
        "initial_state": normal(batch, value_heads, keys, values),
        "d_o": normal(*run_shape, values),
        "d_final": normal(batch, value_heads, keys, values),
    }
    if gate != "none":
        problem["g"] = -slow * (uniform(*run_shape) if gate == "scalar" else uniform(*run_shape, keys))
    return problem


def solve(
    problem: dict[str, Tensor],
    backend: str = "torch",
    dtype: torch.dtype = torch.float64,
    sp: lasp.SequenceParallel | None = None,
    device: torch.device | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs, final state and all gradients; of this rank's shard where there are ranks."""
    whole = ("initial_state", "d_final")
    shards = {name: t if sp is None or name in whole else sp.shard(t) for name, t in problem.items()}
    local = {name: t.to(device, dtype, copy=True) for name, t in shards.items()}
    # Every rank holds a different share of the final state's gradient; only their sum is the problem's.
    share = 1.0 if sp is None else (2.0 * sp.rank + 1.0) / sp.size**2
    d_o, d_final = local.pop("d_o"), local.pop("d_final") * share
    leaves = {name: t.requires_grad_() for name, t in local.items()}
    o, final = lasp.delta_rule(
        leaves["q"], leaves["k"], leaves["v"], leaves["beta"], leaves.get("g"),
        initial_state=leaves["initial_state"], output_final_state=True, backend=backend, sp=sp,
        erase_key=leaves.get("erase_key"), **options,
    )  # fmt: skip
    torch.autograd.backward((o, final), (d_o, d_final))
    return {
        "o": o.detach(),
        "final_state": final.detach(),
        **{f"d_{name}": t.grad for name, t in leaves.items()},
    }


def errors(values: dict[str, Tensor], references: dict[str, Tensor], sp: lasp.SequenceParallel) -> dict[str, float]:
    """This rank's: its shard of outputs and gradients, the whole final state, d_initial_state on the first rank."""
    own = {n: t if n in ("final_state", "d_initial_state") else sp.shard(t) for n, t in references.items()}
    own["d_initial_state"] = own["d_initial_state"] * (sp.rank == 0)
    return {name: relative_error(value.cpu(), own[name]) for name, value in values.items()}


@given(
    gate=st.sampled_from(GATES),
    batch=st.integers(1, 2),
    tokens=st.one_of(st.integers(0, 5), st.integers(62, 66), st.just(130)),
    heads=st.sampled_from([(1, 1), (2, 2), (1, 3), (2, 4)]),
    keys=st.integers(1, 9),
    values=st.integers(1, 9),
    slow=st.sampled_from([0.0, 1e-3, 0.1, 30.0]),
    normalize_qk=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_chunks_equal_tokens(gate, batch, tokens, heads, keys, values, slow, normalize_qk, seed):
    # A single channel's direction is its sign: what gradient there is comes from the epsilon, and is mostly rounding.
    normalize_qk = normalize_qk and keys > 1
    problem = make(
        gate, batch=batch, tokens=tokens, heads=heads[0], value_heads=heads[1], keys=keys, values=values,
        slow=slow, seed=seed,
    )  # fmt: skip
    expected = solve(problem, "reference", normalize_qk=normalize_qk)
    name, error = worst(solve(problem, normalize_qk=normalize_qk), expected)
    assert error < FP64, name


@pytest.mark.parametrize("mistake", ["no state", "later gate", "half the write"])
def test_mistakes_are_seen(mistake):
    """The control: the same comparison fails by far for small mistakes in the recurrence."""
    problem = make("scalar", tokens=130)
    expected = solve(problem, "reference")
    if mistake == "no state":
        problem["initial_state"] = torch.zeros_like(problem["initial_state"])
    elif mistake == "later gate":
        problem["g"] = problem["g"].roll(1, 1)
    else:
        problem["beta"][:, 64] /= 2
    assert worst(solve(problem), expected)[1] > 1e-3


@pytest.mark.parametrize("gate", GATES)
def test_fp32_against_fp64(gate):
    """Thousands of tokens that hardly decay, with strong writes: the hard case for rounding."""
    problem = make(gate, batch=1, tokens=1024, keys=16, values=16, slow=1e-3)
    name, error = worst(solve(problem, dtype=torch.float32), solve(problem))
    assert error < FP32, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """16-bit inputs keep fp32 states and unit keys: only the output's rounding is lost, also where beta is 2."""
    problem = make("scalar", batch=1, tokens=2048, keys=16, values=16, slow=1e-3, beta=(1.5, 2.0))
    q, k, v = (problem[name].to(dtype) for name in "qkv")
    o, final = lasp.delta_rule(q, k, v, problem["beta"], problem["g"], output_final_state=True, normalize_qk=True)
    exact, _ = lasp.delta_rule(*(t.double() for t in (q, k, v)), problem["beta"], problem["g"], normalize_qk=True)
    assert o.dtype == dtype and final.dtype == torch.float32
    assert relative_error(o, exact) < 5e-3


def test_normalized_keys_are_unit_keys():
    """Normalisation in the operator is the one by hand, up to its epsilon; without it the result is another."""
    problem = make("none", tokens=70)
    q, k, v, beta = (problem[name] for name in ("q", "k", "v", "beta"))
    inside, _ = lasp.delta_rule(q, 3 * k, v, beta, normalize_qk=True)
    outside, _ = lasp.delta_rule(normalize(q, dim=-1), k, v, beta)
    assert relative_error(inside, outside) < 1e-5
    assert relative_error(lasp.delta_rule(q, k, v, beta)[0], outside) > 1e-2


@pytest.mark.parametrize("gate", GATES)
def test_crosses_ranks(gate):
    """Three ranks with shards of any length, every schedule: outputs, states and every gradient on every rank."""
    problems = [make(gate, tokens=tokens, heads=1, value_heads=2) for tokens in (9, 150)]
    expected = [solve(problem, "reference") for problem in problems]
    shards = [[None, (0, 0, 9), (4, 1, 4)], [None, (150, 0, 0), (1, 68, 81)]]

    def work(rank: int) -> list[tuple[str, float]]:
        failures = []
        for exchange in EXCHANGES:
            base = lasp.SequenceParallel(dist.group.WORLD, exchange=exchange)
            for problem, reference, cuts in zip(problems, expected, shards, strict=True):
                for lengths in cuts:
                    sp = base.with_lengths(lengths)
                    for name, error in errors(solve(problem, sp=sp), reference, sp).items():
                        if not error < FP64:
                            failures.append((f"{exchange} {lengths} {name}", error))
        return failures

    for rank, failures in enumerate(run(3, work)):
        assert not failures, (rank, failures[:5])


def test_a_chain_carries_no_transition():
    """One state crosses each boundary over the ring; the all-gather sends the K x K transitions too."""
    problem = make("scalar", batch=1, tokens=30, keys=8, values=4)
    state_bytes, transition_bytes = 8 * (2 * 8 * 4), 8 * (2 * 8 * 8)

    def work(rank: int) -> list[int]:
        sent = []
        for exchange in ("ring", "all_gather"):
            sp = lasp.SequenceParallel(dist.group.WORLD, exchange=exchange)
            shard = [sp.shard(problem[name]) for name in ("q", "k", "v", "beta", "g")]
            lasp.delta_rule(*shard, sp=sp)
            sp.counters.reset()
            lasp.delta_rule(*shard, sp=sp)
            sent.append(sp.counters.sent_bytes)
        return sent

    for rank, (ring, gathered) in enumerate(run(3, work)):
        assert ring == (state_bytes if rank < 2 else 0)
        assert gathered == 2 * (state_bytes + transition_bytes)


@pytest.mark.parametrize("gate", GATES)
def test_state_continues_a_sequence(gate):
    problem = make(gate, tokens=90)
    tensors = [problem.get(name) for name in ("q", "k", "v", "beta", "g")]
    whole, _ = lasp.delta_rule(*tensors)

    def part(piece, state):
        cut = [t if t is None else t[:, piece] for t in tensors]
        return lasp.delta_rule(*cut, initial_state=state, output_final_state=True)

    for cut in (1, 33, 64, 89):
        first, state = part(slice(0, cut), None)
        second, _ = part(slice(cut, None), state)
        assert relative_error(torch.cat([first, second], 1), whole) < 1e-13
        forgetful, _ = part(slice(cut, None), None)
        assert relative_error(forgetful, whole[:, cut:]) > 1e-3


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("start", "poison"), [(64, torch.nan), (70, 1e100)])
def test_future_is_not_seen(gate, start, poison):
    """Whatever the future holds, outputs and gradients before it keep their bits; NaN from the next chunk on."""
    problem = make(gate, tokens=100)

    def past(future):
        leaves = {name: problem[name].clone() for name in ("q", "k", "v", "beta", "g") if name in problem}
        if future is not None:
            leaves["v"][:, start:] = future
            if future != future:
                leaves["k"][:, start:] = future
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        o, _ = lasp.delta_rule(*(leaves.get(name) for name in ("q", "k", "v", "beta", "g")))
        (d_q,) = torch.autograd.grad(o[:, :start].sum(), leaves["q"])
        return o[:, :start], d_q[:, :start]

    for clean, poisoned in zip(past(None), past(poison), strict=True):
        assert torch.equal(clean, poisoned)
    assert not torch.equal(past(None)[0], past(None)[0].flip(1)), "the control: the comparison can fail"


def test_beta_zero_leaves_the_state_alone():
    problem = make("none", tokens=70, beta=(0.0, 0.0))
    result = solve(problem)
    assert torch.equal(result["final_state"], problem["initial_state"])
    expected = torch.einsum("bthk,bhkv->bthv", problem["q"], problem["initial_state"]) * 5**-0.5
    assert relative_error(result["o"], expected) < 1e-15
    control = solve(make("none", tokens=70, beta=(0.0, 0.1)))
    assert relative_error(control["final_state"], problem["initial_state"]) > 1e-2


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_through_a_token_that_erases_all(backend):
    """One channel, beta |k|^2 = 1: the token's transition is zero, its derivatives -|k|^2 and -2 beta k are not."""
    k = torch.tensor([1.0, 0.5, -1.0, 2.0], dtype=torch.float64).view(1, 4, 1, 1).requires_grad_()
    beta = torch.tensor([1.0, 1.5, 1.0, 0.25], dtype=torch.float64).view(1, 4, 1).requires_grad_()
    v = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    q = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    o, _ = lasp.delta_rule(q, k, v.view(1, 4, 1, 1), beta, scale=1.0, backend=backend)
    found = [o.sum(), *torch.autograd.grad(o.sum(), (k, beta))]
    state, total = 0.0, 0.0
    for t in range(4):
        state = (1 - beta[0, t, 0] * k[0, t, 0, 0] ** 2) * state + beta[0, t, 0] * k[0, t, 0, 0] * v[t]
        total = total + state
    for value, expected in zip(found, (total, *torch.autograd.grad(total, (k, beta))), strict=True):
        assert relative_error(value, expected) < FP64


def test_beta_two_reflects():
    """Without values, beta = 2 turns the state by a product of reflections: its norm stays, over any length."""
    problem = make("none", batch=1, tokens=4096, keys=8, beta=(2.0, 2.0))
    problem["v"].zero_()

    def final_norm(keys: Tensor) -> float:
        state = problem["initial_state"].float()
        inputs = (t.float() for t in (problem["q"], keys, problem["v"], problem["beta"]))
        return (
            (lasp.delta_rule(*inputs, initial_state=state, output_final_state=True)[1].norm() / state.norm())
            .log()
            .abs()
            .item()
        )

    assert final_norm(problem["k"]) < 1e-4
    assert final_norm(1.01 * problem["k"]) > 1, "the control: keys that are too long"


@pytest.mark.parametrize("gate", ["none", "channel"])
def test_orthonormal_keys_recall_exactly(gate):
    """beta = 1 and orthonormal keys: a second value under a key replaces the first, and is read back as it was."""
    size = 8
    keys, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    values = torch.randn(2 * size, 3, dtype=torch.float64)
    k = torch.cat([keys, keys])[None, :, None]
    g = None if gate == "none" else torch.zeros(1, 2 * size, 1, size, dtype=torch.float64)
    arguments = (k, k, values[None, :, None])
    ones = torch.ones(1, 2 * size, 1, dtype=torch.float64)
    _, state = lasp.delta_rule(*arguments, ones, g, output_final_state=True)
    assert relative_error(keys @ state[0, 0], values[size:]) < 1e-14
    _, summed = lasp.linear_attention(*arguments, output_final_state=True)
    assert relative_error(keys @ summed[0, 0], values[size:]) > 0.1, "the control: linear attention adds them up"


def test_extreme_decays():
    """A decay of exactly zero, one that underflows, and none, side by side: no NaN, and the reference's values."""
    for gate in ("scalar", "channel"):
        problem = make(gate, tokens=130, slow=0.0)
        g = problem["g"]
        g[:, 3::7] = -torch.inf
        g[:, 5::11] = -2000.0
        g[:, 6::13] = -20.0
        got, expected = solve(problem), solve(problem, "reference")
        # exp(-inf) has a zero derivative, which the reference's autograd cannot form as 0 * inf.
        expected["d_g"] = expected["d_g"].masked_fill(g == -torch.inf, 0.0)
        name, error = worst(got, expected)
        assert error < FP64, (gate, name)


OK = {"q": (2, 8, 2, 4), "k": (2, 8, 2, 4), "v": (2, 8, 4, 3), "beta": (2, 8, 4)}


def _call(**changed):
    tensors = {name: torch.zeros(shape) for name, shape in OK.items()}
    tensors.update(changed)
    return lasp.delta_rule(*(tensors.pop(name) for name in OK), tensors.pop("g", None), **tensors)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.zeros(2, 8, 2, 5)}, r"k must have q's shape"),
        ({"beta": torch.zeros(2, 8, 2)}, r"beta must be \[B, T, H_v\] \(2, 8, 4\), got \(2, 8, 2\)"),
        ({"beta": torch.zeros(2, 8, 4, dtype=torch.int64)}, r"beta must be floating point"),
        ({"beta": torch.full((2, 8, 4), 2.5)}, r"beta must be in \[0, 2\] .*; got values from 2.5 to 2.5"),
        ({"beta": torch.full((2, 8, 4), torch.nan)}, r"beta must be in \[0, 2\]"),
        ({"g": torch.zeros(4)}, r"g must be \[B, T, H_v\] \(2, 8, 4\) or \[B, T, H_v, K\] .*, got \(4,\)"),
        ({"g": torch.full((2, 8, 4), 0.9)}, r"must be <= 0 .*largest value of 0.9"),
        ({"initial_state": torch.zeros(2, 4, 3, 4)}, r"initial_state must be \[B, H_v, K, V\] \(2, 4, 4, 3\)"),
        ({"backend": "cuda"}, r"backend must be one of"),
        ({"sp": "ring"}, r"sp must be a SequenceParallel"),
        ({"backend": "fla"}, r'runs on GPUs, the tensors are on cpu: use backend="torch"'),
    ],
)
def test_message(changed, message):
    with pytest.raises(ValueError, match=message):
        _call(**changed)


def test_compilers_known_to_be_wrong_are_refused():
    for version in ("3.4.0", "3.6.0", "3.7.0", "3.7.0+git1"):
        with pytest.raises(ValueError, match=f"Triton {version}".replace("+", r"\+")):
            check_triton(version)
    for version in ("3.3.1", "3.7.1", "3.8.0", "4.0"):
        check_triton(version)


def test_valid_call_passes():
    """The control: the same call, unchanged, is accepted."""
    assert _call()[0].shape == (2, 8, 4, 3)


def test_ranks_that_differ():
    """One rank normalises and the other does not: the same error on both."""

    def work(rank: int) -> str:
        sp = lasp.SequenceParallel(dist.group.WORLD, timeout_s=20)
        try:
            _call(sp=sp, normalize_qk=rank == 1)
        except lasp.ExchangeError as error:
            return str(error)
        return ""

    first, second = run(2, work)
    assert first == second and "normalize_qk: rank 0 has False, rank 1 has True" in first


@pytest.mark.parametrize("gate", GATES)
def test_an_erase_key_of_its_own(gate):
    """Chunks equal tokens; a key that erases with itself is the delta rule; another is not."""
    problem = make(gate, tokens=70, value_heads=4, slow=0.2, beta=(0.5, 1.0))
    plain = solve(problem, "torch")
    for key, same in ((problem["k"], True), (0.5 * problem["k"].roll(1, 3), False)):
        erasing = problem | {"erase_key": key}
        expected = solve(erasing, "reference")
        name, error = worst(solve(erasing, "auto"), expected)
        assert error < FP64, name
        whole = expected["d_k"] + expected["d_erase_key"] if same else expected["d_k"]
        assert (relative_error(whole, plain["d_k"]) < FP64) == same
        assert (relative_error(expected["o"], plain["o"]) < FP64) == same


@pytest.mark.parametrize("schedule", ["ring", "doubling"])
def test_an_erase_key_across_ranks(schedule):
    problem = make("scalar", batch=1, tokens=20, slow=0.2, beta=(0.5, 1.0))
    problem["erase_key"] = 0.5 * problem["k"].roll(1, 3)
    references = solve(problem)

    def work(comm):
        sp = sequence_parallel(comm, schedule, (7, 0, 13))
        return errors(solve(problem, sp=sp), references, sp)

    for found in simulate(3, work):
        assert max(found.values()) < FP64, found


def test_what_an_erase_key_must_be():
    problem = make("none", tokens=3)
    tensors = {name: problem[name] for name in ("q", "k", "v", "beta")}
    for options, message in (
        ({"erase_key": problem["k"][..., :2]}, "erase_key must be as k"),
        ({"erase_key": problem["k"], "normalize_qk": True}, "normalize_qk"),
        ({"erase_key": problem["k"], "backend": "fla"}, "has no erase_key"),
    ):
        with pytest.raises(ValueError, match=message):
            lasp.delta_rule(**tensors, **options)
