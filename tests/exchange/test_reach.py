"""Decay reach: heads that forget take the short way, and every bit stays what it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from simulated import run
from tolerances import relative_error

from lasp.algebra import Dense, Diagonal, Scalar, Summary, scan
from lasp.exchange import EXCHANGES, Payload, Reach, forgets_constant
from lasp.exchange.schedules.reach import ZERO_BELOW, forgets
from lasp.exchange.schedules.ring import Ring

BATCH, HEADS, K, V = 2, 4, 3, 5
# Per head: gone after one shard, subnormal after one shard, slow, none.
GATES = torch.tensor([-200.0, -100.0, -0.5, 0.0])


def runs_of(kind: str, size: int, dtype: torch.dtype, seed: int, cuts: float = 0.3) -> Summary:
    """Heads of all kinds; some ranks have a decay of zero, as where a document starts."""
    random = torch.Generator().manual_seed(seed)
    gates = GATES.to(dtype) * (1 if dtype == torch.float32 else 10)
    cut = torch.rand(size, BATCH, HEADS, generator=random) < cuts
    if kind == "dense":
        matrix = torch.randn(size, BATCH, HEADS, K, K, generator=random, dtype=dtype) / 2
        transition = Dense(torch.where(cut[..., None, None], 0.0, matrix))
    else:
        decay = torch.where(cut, -torch.inf, gates)
        # Channels of a head decay alike but for one, so that some heads forget in part only.
        slow = torch.randn(size, BATCH, HEADS, K, generator=random) > 0.8
        diagonal = torch.where(slow & ~cut[..., None], -0.1, decay[..., None]).to(dtype)
        transition = Scalar(decay) if kind == "scalar" else Diagonal(diagonal)  # type: ignore[assignment]
    return Summary(transition, torch.randn(size, BATCH, HEADS, K, V, generator=random, dtype=dtype))


def carry(exchange, runs: Summary, initial, *, reverse: bool = False, want_total: bool = False, seed: int = 0, **extra):
    """Returns what each rank gets, its counters and its clock, in rounds."""

    def work(comm):
        pending = exchange.begin(comm, runs[comm.rank], initial, reverse=reverse, want_total=want_total, **extra)
        return *pending.wait(), (comm.counters.sent_bytes, comm.counters.received_bytes), comm.time

    return run(runs.state.shape[0], work, seed=seed)


def who_forgets(runs: Summary) -> torch.Tensor:
    """bool [ranks, batch * heads]."""
    size = runs.state.shape[0]
    parts = (t.reshape(size * BATCH * HEADS, *t.shape[3:]) for t in runs.transition.tensors())
    whole = type(runs.transition)(*parts)
    return forgets(whole, runs.state.reshape(-1, K, V)).view(size, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["scalar", "diagonal"])
def test_same_bits_fewer_bytes(kind, dtype):
    """Every size, direction, base and patience: the bits of the base, the bytes declared."""
    for seed, (size, reverse, base) in enumerate(
        itertools.product((2, 3, 4, 5, 8), (False, True), ("ring", "all_gather", "all_to_all", "pipelined"))
    ):
        runs = runs_of(kind, size, dtype, seed)
        initial = torch.randn(BATCH, HEADS, K, V, dtype=dtype)
        masks = who_forgets(runs).flip(0) if reverse else who_forgets(runs)
        assert masks.any() and not masks.all()
        plain = carry(EXCHANGES[base](), runs, initial, reverse=reverse, want_total=True)
        for max_hops in (1, 2, 8):
            exchange = Reach(EXCHANGES[base](), max_hops)
            results = carry(exchange, runs, initial, reverse=reverse, want_total=True, seed=seed)
            for rank, (entering, total, counted, _) in enumerate(results):
                assert torch.equal(entering, plain[rank][0]) and torch.equal(total, plain[rank][1])
                position = size - 1 - rank if reverse else rank
                declared = exchange.routed_traffic(Payload.of(runs[0]), position, (size,), masks, True)
                masks_bytes = BATCH * HEADS * (size - 1) if size > 2 else 0
                assert counted == (declared.sent_bytes + masks_bytes, declared.received_bytes + masks_bytes)


def test_matrices_that_are_zero():
    """Documents that start within a shard cut the delta rule's chain as well."""
    runs = runs_of("dense", 5, torch.float64, 1, cuts=0.5)
    initial = torch.ones(BATCH, HEADS, K, V, dtype=torch.float64)
    entering, total = scan(runs, initial)
    for rank, result in enumerate(carry(Reach(max_hops=1), runs, initial, want_total=True)):
        assert relative_error(result[0], entering[rank]) < 1e-13 and relative_error(result[1], total) < 1e-13


def test_neighbours_only():
    """All heads forget: one message a rank instead of a chain, one state instead of seven, and no masks if known."""
    size = 8
    runs = runs_of("scalar", size, torch.float32, 0, cuts=1.0)
    initial = torch.zeros(BATCH, HEADS, K, V)
    state = BATCH * HEADS * K * V * 4
    chain, gather = (carry(EXCHANGES[name](), runs, initial) for name in ("ring", "all_gather"))
    known = torch.ones(size, BATCH * HEADS, dtype=torch.bool)
    near = carry(Reach(), runs, initial, known=known)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(chain, near, strict=True))
    assert [rounds for *_, rounds in near] == [0] + [1] * (size - 1)
    assert [rounds for *_, rounds in chain] == list(range(size))
    assert [counted[1] for *_, counted, _ in near] == [0] + [state] * (size - 1)
    assert all(counted[1] == (state + 4 * BATCH * HEADS) * (size - 1) for *_, counted, _ in gather)
    # Learnt at run time it costs a byte a head and rank, and one more round.
    learnt = carry(Reach(), runs, initial)
    assert learnt[3][2][1] == state + BATCH * HEADS * (size - 1) and learnt[3][3] == 2


def test_constant_decay_is_known_beforehand():
    """Lengths and decays alone tell; never more heads than those whose transition is zero."""
    gate = torch.tensor([-1.0, -0.1, -0.01, -0.0259, -0.0261, -0.0])
    lengths = (4000, 1000, 0, 10_000)
    for dtype in (torch.float32, torch.float64):
        known = forgets_constant(gate, lengths, 2, dtype)
        assert known.shape == (4, 12) and not known[2].any() and not known[:, 5].any()
        for rank, tokens in enumerate(lengths):
            transition = Scalar((gate.to(dtype) * tokens).expand(2, 6).reshape(12))
            actual = forgets(transition, torch.zeros(12, K, V, dtype=dtype))
            assert not (known[rank] & ~actual).any()
            assert known[rank, 0] == (tokens * 1.0 > -ZERO_BELOW[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_of_underflow(dtype):
    """Below the bound exp is zero; a subnormal decay above it is not, and its head takes the long way."""
    bound = ZERO_BELOW[dtype]
    assert torch.tensor([bound] * 40, dtype=dtype).exp().eq(0).all()
    assert torch.tensor([bound + 1.5] * 40, dtype=dtype).exp().gt(0).all()
    state = torch.zeros(4, K, V, dtype=dtype)
    decays = torch.tensor([bound + 1.5, bound, -torch.inf, 0.0], dtype=dtype)
    assert forgets(Scalar(decays), state).tolist() == [False, True, True, False]
    partly = torch.stack([decays, torch.full_like(decays, -torch.inf), decays], -1)
    assert forgets(Diagonal(partly), state).tolist() == [False, True, True, False]
    nilpotent = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, -1.0, 0.0]], dtype=dtype)
    assert forgets(Dense(nilpotent[None]), state[:1]).tolist() == [False]


def test_nothing_passes_a_rank_that_forgets():
    """NaN, infinity and the largest numbers before it are gone after it, in both directions."""
    for reverse, poison in itertools.product((False, True), (torch.nan, torch.inf, 3e38)):
        runs = runs_of("scalar", 4, torch.float32, 3, cuts=1.0)
        clean = carry(Reach(), runs, torch.zeros(BATCH, HEADS, K, V), reverse=reverse)
        runs.state[3 if reverse else 0] = poison
        dirty = carry(Reach(), runs, torch.full((BATCH, HEADS, K, V), poison), reverse=reverse)
        for rank in (0, 1) if reverse else (2, 3):
            assert torch.equal(clean[rank][0], dirty[rank][0])


def test_the_comparison_can_fail():
    """A head taken to forget that does not is off."""
    runs = runs_of("scalar", 4, torch.float32, 0, cuts=0.0)
    initial = torch.zeros(BATCH, HEADS, K, V)
    wrong = carry(Reach(), runs, initial, known=torch.ones(4, BATCH * HEADS, dtype=torch.bool))
    right = carry(Ring(), runs, initial)
    assert not torch.equal(wrong[3][0], right[3][0])
    assert torch.equal(wrong[3][0][:, 0], right[3][0][:, 0]), "the head that does forget is right"


def test_bytes_saved_by_lightning_decays():
    """The figures of docs/results/exchanges.md: 16 heads, slopes 2^(-h/2), K = V = 128, fp32, by the last rank."""
    gate = -(2.0 ** -(torch.arange(1, 17) / 2))
    load = Payload(heads=16, keys=128, values=128, transition=1)
    rows = []
    for size, tokens in ((8, 16_384), (8, 32_768), (64, 16_384), (64, 32_768)):
        known = forgets_constant(gate, [tokens] * size, 1, torch.float32)
        reach = Reach().traffic(load, size - 1, (size,), want_total=False, known=known)
        plain = EXCHANGES["all_gather"]().traffic(load, size - 1, (size,), want_total=False)
        rows.append((size, tokens, int(known[0].sum()), plain.received_bytes, reach.received_bytes))
    assert rows == [
        (8, 16_384, 14, 7_340_480, 1_835_064),
        (8, 32_768, 16, 7_340_480, 1_048_576),
        (64, 16_384, 14, 66_064_320, 9_175_544),
        (64, 32_768, 16, 66_064_320, 1_048_576),
    ]
