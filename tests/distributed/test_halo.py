"""Short convolution and token shift across ranks, against torch's conv1d on each document alone."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from exchange.simulated import run as simulate
from exchange.simulated import sequence_parallel
from tolerances import relative_error
from torch import Tensor
from world import run

import lasp
from lasp.halo import exchange as halo_exchange
from lasp.layers import ShortConvolution

BOUND = 1e-12
C = 3
# Tokens of every rank: equal, ragged, single tokens, empty at every place, all shorter than the width.
LENGTHS = {
    1: [(9,)],
    2: [(6, 6), (12, 0), (0, 12), (1, 11), (11, 1)],
    3: [(4, 4, 4), (1, 1, 10), (0, 3, 0), (10, 0, 2)],
    4: [(3, 3, 3, 3), (1, 0, 1, 1), (0, 0, 9, 1), (5, 1, 0, 1), (0, 0, 0, 0)],
}


def problem(tokens: int, width: int, states: int, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    return {
        "x": normal(batch, tokens, C), "weight": normal(C, width), "bias": normal(C),
        "initial_state": normal(states, C, width - 1),
        "d_y": normal(batch, tokens, C), "d_final": normal(states, C, width - 1),
    }  # fmt: skip


def by_document(given: dict[str, Tensor], bounds: tuple[int, ...] | None, activation: str | None) -> dict[str, Tensor]:
    """Each document alone through conv1d, its initial state before it."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("x", "weight", "bias", "initial_state")}
    width = given["weight"].shape[1]
    spans = list(itertools.pairwise(bounds)) if bounds else [(0, given["x"].shape[1])]
    outputs, finals = [], []
    for n, (start, end) in enumerate(spans):
        state = leaves["initial_state"][n : n + 1] if bounds else leaves["initial_state"]
        padded = torch.cat((state, leaves["x"][:, start:end].transpose(1, 2)), 2)
        if end > start:
            y = F.conv1d(padded, leaves["weight"][:, None], leaves["bias"], groups=C).transpose(1, 2)
            outputs.append(F.silu(y) if activation else y)
        finals.append(padded[:, :, padded.shape[2] - width + 1 :])
    y = torch.cat(outputs, 1) if outputs else 0 * leaves["bias"] * leaves["weight"].sum() + leaves["x"]
    final = torch.cat(finals)
    torch.autograd.backward((y, final), (given["d_y"], given["d_final"]))
    return {"y": y.detach(), "final": final.detach(), **{f"d_{name}": leaf.grad for name, leaf in leaves.items()}}


def errors(
    sp: lasp.SequenceParallel,
    given: dict[str, Tensor],
    expected: dict[str, Tensor],
    activation: str | None = None,
    bounds: tuple[int, ...] | None = None,
) -> dict[str, float]:
    """This rank's errors, the ranks but the last giving different shares of the final state's gradient."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("weight", "bias", "initial_state")}
    leaves["x"] = sp.shard(given["x"]).clone().requires_grad_()
    y, final = lasp.short_convolution(
        leaves["x"], leaves["weight"], leaves["bias"], activation=activation, initial_state=leaves["initial_state"],
        output_final_state=True, cu_seqlens=bounds, sp=sp,
    )  # fmt: skip
    if sp.rank == sp.size - 1 > 0:  # a rank that makes no use of the state must not keep the others waiting
        y.backward(sp.shard(given["d_y"]))
    else:
        share = given["d_final"] * (sp.rank + 1.0) / max(1, sp.size * (sp.size - 1) // 2)
        torch.autograd.backward((y, final), (sp.shard(given["d_y"]), share))
    found = {"y": y, "final": final, **{f"d_{name}": leaf.grad for name, leaf in leaves.items()}}
    result = {}
    for name, value in found.items():
        reference = expected[name]
        if name in ("y", "d_x"):
            reference = sp.shard(reference)
        elif name == "d_initial_state" and sp.rank > 0:
            reference = torch.zeros_like(reference)
        elif name in ("d_weight", "d_bias"):
            value = sp.comm.sum(value)
        result[name] = relative_error(value, reference)
    return result


@pytest.mark.parametrize("size", LENGTHS)
def test_convolution_equals_one_device(size):
    cases = []
    for lengths, width, activation in itertools.product(LENGTHS[size], (1, 2, 4, 8), (None, "silu")):
        given = problem(sum(lengths), width, 2, batch=2)
        cases.append((lengths, activation, given, by_document(given, None, activation)))

    def work(rank: int) -> list:
        base = lasp.SequenceParallel(dist.group.WORLD)
        return [
            (lengths, given["weight"].shape[1], name, error)
            for lengths, activation, given, expected in cases
            for name, error in errors(base.with_lengths(lengths), given, expected, activation).items()
            if not error < BOUND
        ]

    assert [failure for failures in run(size, work) for failure in failures] == []


def test_packed_documents_with_states_over_processes():
    """Random shards and boundaries, zero-length and one-token documents, states of every document."""
    random = torch.Generator().manual_seed(3)
    cases = []
    for seed in range(40):
        tokens = int(torch.randint(0, 14, (), generator=random))
        cuts = sorted(torch.randint(0, tokens + 1, (3 + seed % 4,), generator=random).tolist())
        edges = sorted(torch.randint(0, tokens + 1, (2,), generator=random).tolist())
        lengths = tuple(b - a for a, b in itertools.pairwise((0, *edges, tokens)))
        bounds = (0, *cuts, tokens)
        given = problem(tokens, 1 + seed % 5, len(bounds) - 1, seed=seed)
        cases.append((lengths, bounds, given, by_document(given, bounds, None)))

    def work(rank: int) -> list:
        base = lasp.SequenceParallel(dist.group.WORLD)
        return [
            (lengths, bounds, name, error)
            for lengths, bounds, given, expected in cases
            for name, error in errors(base.with_lengths(lengths), given, expected, bounds=bounds).items()
            if not error < BOUND
        ]

    assert [failure for failures in run(3, work) for failure in failures] == []


@pytest.mark.parametrize(
    ("lengths", "every"),
    [
        pytest.param((3, 3, 3, 3), 11, marks=pytest.mark.ci),
        ((1, 0, 2, 9), 17),
        pytest.param((3, 3, 3, 3), 1, marks=pytest.mark.exhaustive),
    ],
)
def test_all_document_boundaries(lengths, every):
    """T = 12 over 4 ranks, the 2^11 ways to cut it into documents, against a matrix that knows the documents."""
    tokens, width = 12, 4
    given = problem(tokens, width, 1)
    position = torch.arange(tokens)
    # taps[j, t, s] = 1 where s is j tokens before t
    taps = torch.stack([(position[:, None] - position == j).double() for j in range(width)])

    def by_matrix(bounds: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        of = torch.tensor(bounds[1:-1], dtype=torch.int64)
        document = torch.searchsorted(of, position, right=True)
        same = (document[:, None] == document).double()
        x, weight = (given[name].clone().requires_grad_() for name in ("x", "weight"))
        y = torch.einsum("jts,bsc,cj->btc", taps * same, x, weight.flip(1))
        return y.detach(), *torch.autograd.grad(y, (x, weight), given["d_y"])  # type: ignore[return-value]

    subsets = [(0, *(cut for cut in range(1, 12) if mask >> (cut - 1) & 1), 12) for mask in range(0, 2**11, every)]
    expected = [by_matrix(bounds) for bounds in subsets]

    def work(comm):
        sp = sequence_parallel(comm, "ring", lengths)
        worst, d_weights = 0.0, []
        for bounds, (y, d_x, _) in zip(subsets, expected, strict=True):
            x, weight = sp.shard(given["x"]).clone().requires_grad_(), given["weight"].clone().requires_grad_()
            found, _ = lasp.short_convolution(x, weight, cu_seqlens=bounds, sp=sp)
            found.backward(sp.shard(given["d_y"]))
            worst = max(worst, (found - sp.shard(y)).abs().amax().item() if found.numel() else 0.0)
            worst = max(worst, (x.grad - sp.shard(d_x)).abs().amax().item() if x.numel() else 0.0)
            d_weights.append(weight.grad)
        return worst, torch.stack(d_weights)

    results = simulate(4, work)
    assert max(worst for worst, _ in results) < 1e-13
    d_weight = sum(d_weights for _, d_weights in results)
    assert (d_weight - torch.stack([d_weight for _, _, d_weight in expected])).abs().amax() < 1e-12


def test_a_document_of_nan_reaches_no_other():
    bounds = (0, 3, 5, 6, 6, 11, 12)

    def work(comm):
        sp = sequence_parallel(comm, "ring", (4, 1, 0, 7))
        given = problem(12, 4, 6)
        clean = []
        for bad, (start, end) in enumerate(itertools.pairwise(bounds)):
            x, d_y, state = given["x"].clone(), given["d_y"].clone(), given["initial_state"].clone()
            x[:, start:end] = d_y[:, start:end] = state[bad] = torch.nan
            here = torch.ones(12, dtype=torch.bool)
            here[start:end] = False
            shard, state = sp.shard(x).clone().requires_grad_(), state.requires_grad_()
            y, final = lasp.short_convolution(
                shard, given["weight"], initial_state=state, output_final_state=True, cu_seqlens=bounds, sp=sp
            )
            torch.autograd.backward((y, final), (sp.shard(d_y), torch.ones_like(final)))
            others = [n for n in range(6) if n != bad]
            clean += [
                y[:, sp.shard(here, 0)].isfinite().all(), shard.grad[:, sp.shard(here, 0)].isfinite().all(),
                final[others].isfinite().all(), state.grad[others].isfinite().all(),
                final[bad].isnan().all(),
            ]  # fmt: skip
        return torch.stack(clean).all()

    assert all(simulate(4, work))


def test_thousands_of_documents_of_one_token():
    tokens = 4096
    given = problem(tokens, 4, 1)
    bounds = torch.arange(tokens + 1)

    def work(comm):
        sp = sequence_parallel(comm, "ring", (1000, 3000, 0, 96))
        y, _ = lasp.short_convolution(sp.shard(given["x"]), given["weight"], cu_seqlens=bounds, sp=sp)
        shifted, _ = lasp.token_shift(sp.shard(given["x"]), cu_seqlens=bounds, sp=sp)
        assert not shifted.any()
        assert comm.counters.messages == 0, "every halo belongs to another document: nothing is sent"
        return relative_error(y, sp.shard(given["x"] * given["weight"][:, -1]))

    assert max(simulate(4, work)) < BOUND


@pytest.mark.parametrize("bounds", [None, (0, 1, 1, 6, 9, 12)])
def test_token_shift(bounds):
    """The convolution's mechanism with other arithmetic: against slices of the whole sequence."""
    given = problem(12, 2, 1 if bounds is None else 5)
    x, state = (given[name].clone().requires_grad_() for name in ("x", "initial_state"))
    pieces, finals = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds or (0, 12))):
        rows = torch.cat((state[n : n + 1, :, 0][:, None], x[:, start:end]), 1)
        pieces.append(rows[:, :-1])
        finals.append(rows[:, -1])
    y, final = torch.cat(pieces, 1), torch.cat(finals)
    torch.autograd.backward((y, final), (given["d_y"], given["d_final"][..., 0]))

    def work(rank: int) -> float:
        worst = 0.0
        base = lasp.SequenceParallel(dist.group.WORLD)
        for lengths in ((4, 4, 4), (1, 0, 11), (0, 12, 0)):
            sp = base.with_lengths(lengths)
            shard = sp.shard(given["x"]).clone().requires_grad_()
            initial = given["initial_state"][..., 0].clone().requires_grad_()
            shifted, last = lasp.token_shift(
                shard, initial_state=initial, output_final_state=True, cu_seqlens=bounds, sp=sp
            )
            torch.autograd.backward((shifted, last), (sp.shard(given["d_y"]), given["d_final"][..., 0] / 3))
            d_initial = state.grad[..., 0] if rank == 0 else torch.zeros_like(initial)
            for value, reference in (
                (shifted, sp.shard(y)), (last, final), (shard.grad, sp.shard(x.grad)), (initial.grad, d_initial)
            ):  # fmt: skip
                worst = max(worst, relative_error(value, reference))
        return worst

    assert max(run(3, work)) < BOUND


def test_without_ranks():
    """sp=None, with documents, without states."""
    given = problem(11, 4, 3)
    given["initial_state"].zero_()
    bounds = (0, 2, 9, 11)
    y, final = lasp.short_convolution(given["x"], given["weight"], given["bias"], cu_seqlens=bounds)
    assert final is None and relative_error(y, by_document(given, bounds, None)["y"]) < BOUND
    shifted, _ = lasp.token_shift(given["x"], cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    expected = F.pad(given["x"], (0, 0, 1, -1))
    expected[:, list(bounds[:-1])] = 0
    assert torch.equal(shifted, expected)


def test_gradients_are_sums_over_many_tokens():
    """Sums them in fp32, of weight and bias, over 39,000 tokens. The control: conv1d's."""
    torch.manual_seed(0)
    x, weight, bias, d_y = torch.randn(2, 19500, 2), torch.randn(2, 2), torch.randn(2), torch.randn(2, 19500, 2)

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (weight, bias)]
        return torch.autograd.grad(function(x.to(dtype), *leaves), leaves, d_y.to(dtype))

    def plain(x, weight, bias):
        rows = torch.nn.functional.pad(x.transpose(1, 2), (1, 0))
        return torch.nn.functional.conv1d(rows, weight[:, None], bias, groups=2).transpose(1, 2)

    expected = gradients(plain, torch.float64)
    errors = [
        max(map(relative_error, gradients(function, torch.float32), expected))
        for function in (lambda *leaves: lasp.short_convolution(*leaves)[0], plain)
    ]
    assert errors[0] <= 2e-6 < errors[1], errors


def test_the_layer_continues_and_starts_from_its_generator():
    layer = ShortConvolution(C, 4, bias=True).double()
    layer.reset_parameters(torch.Generator().manual_seed(1))
    x = problem(9, 4, 1)["x"]
    whole, state = layer(x, output_state=True)
    assert state.shape == (1, *layer.state_dims)
    pieces, state = [], None
    for part in x.split((4, 1, 1, 2, 1), 1):
        y, state = layer(part, state=state, output_state=True)
        pieces.append(y)
    assert relative_error(torch.cat(pieces, 1), whole) < BOUND
    other = ShortConvolution(C, 4, bias=True).double()
    other.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(other.weight, layer.weight) and layer.weight.abs().max() <= 0.5


def test_inference_and_autocast_leave_no_trace():
    """Plans made while generating serve training; inside autocast the arguments' dtype is kept, packed or not."""
    given = {name: t.float() for name, t in problem(10, 4, 2).items()}
    bounds = (0, 7, 10)
    with torch.inference_mode():
        lasp.short_convolution(given["x"], given["weight"], cu_seqlens=bounds)
    x = given["x"].clone().requires_grad_()
    y, _ = lasp.short_convolution(x, given["weight"], cu_seqlens=bounds)
    y.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = lasp.short_convolution(x, given["weight"], cu_seqlens=bounds)
    assert torch.equal(again, y)


def mistaken(mistake: str, monkeypatch) -> None:
    """Make the exchange wrong."""
    real = halo_exchange._batch_send_recv

    class Wrong:
        def __init__(self, pending):
            self.pending = pending

        def wait(self):
            message = self.pending.wait()
            return torch.zeros_like(message) if mistake.startswith("dropped") else message.roll(1, 1)

    calls = []

    def batch_send_recv(sp, sends, receives):
        calls.append(1)
        backward = len(calls) % 2 == 0
        pending = real(sp, sends, receives)
        return pending if (mistake == "dropped in backward") > backward else [Wrong(p) for p in pending]

    monkeypatch.setattr(halo_exchange, "_batch_send_recv", batch_send_recv)


@pytest.mark.parametrize("mistake", ["none", "dropped", "dropped in backward", "off by one"])
def test_mistakes_are_seen(mistake, monkeypatch):
    """The control: a lost or shifted halo fails the same comparison by far."""
    given = problem(12, 4, 1)
    expected = by_document(given, None, None)

    def work(rank: int) -> dict[str, float]:
        if mistake != "none":
            mistaken(mistake, monkeypatch)
        return errors(lasp.SequenceParallel(dist.group.WORLD, lengths=(4, 4, 4)), given, expected)

    results = run(3, work)
    worst = {name: max(result[name] for result in results) for name in ("y", "d_x")}
    assert (worst["y"] > 1e-2) == (mistake in ("dropped", "off by one")), worst
    assert (worst["d_x"] > 1e-2) == (mistake != "none"), worst


def test_bytes_equal_the_formula():
    """Each rank sends its last min(W - 1, T) rows to the next, and gets as many gradients back: whatever T is."""

    def work(rank: int) -> None:
        row = 2 * C * 4
        for width, tokens in itertools.product((1, 2, 4), (8, 64)):
            sp = lasp.SequenceParallel(dist.group.WORLD)
            x = torch.randn(2, tokens, C, requires_grad=True)
            y, _ = lasp.short_convolution(x, torch.randn(C, width), sp=sp)
            counters = sp.counters
            assert counters.sent_bytes == row * (width - 1) * (rank < 2)
            assert counters.received_bytes == row * (width - 1) * (rank > 0)
            y.sum().backward()
            neighbours = (rank < 2) + (rank > 0)
            assert counters.sent_bytes == counters.received_bytes == row * (width - 1) * neighbours
        # Short shards: (2, 1, 5) tokens, width 4: rank 2's three rows come from both others.
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=(2, 1, 5))
        lasp.short_convolution(torch.randn(2, (2, 1, 5)[rank], C), torch.randn(C, 4), sp=sp)
        assert sp.counters.sent_bytes == row * (4, 1, 0)[rank]
        # The final state: the last rank's three rows go to both others.
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=(4, 4, 4))
        lasp.short_convolution(torch.randn(2, 4, C), torch.randn(C, 4), output_final_state=True, sp=sp)
        assert sp.counters.sent_bytes == row * (3, 3, 6)[rank]
        assert sp.counters.received_bytes == row * (3, 6, 3)[rank]

    run(3, work)


def test_ranks_that_differ_and_wrong_arguments():
    def work(rank: int) -> list[str]:
        x, weight = torch.zeros(1, 4, C), torch.zeros(C, 3)
        messages = []
        for arguments in (
            {"weight": torch.zeros(C, 3 + rank)},
            {"activation": "silu" if rank else None},
            {"cu_seqlens": (0, 3 + rank, 8)},
            {"cu_seqlens": (0, 9) if rank else (0, 8)},
            {"initial_state": torch.zeros(1, C, 2) if rank else None},
            {"x": torch.zeros(1, 4, C, requires_grad=bool(rank))},
        ):
            sp = lasp.SequenceParallel(dist.group.WORLD, timeout_s=20)
            try:
                lasp.short_convolution(**{"x": x, "weight": weight, "sp": sp, **arguments})  # type: ignore[arg-type]
            except (lasp.ExchangeError, ValueError) as error:
                messages.append(str(error))
        return messages

    first, second = run(2, work)
    assert len(first) == len(second) == 6
    for text, *messages in zip(
        ("width: rank 0 has 3, rank 1 has 4", "options", "documents", "rise from 0 to the 8 tokens",
         "initial_state: rank 0 has False", "requires_grad"), first, second, strict=True,
    ):  # fmt: skip
        assert all(text in message for message in messages), messages

    x, weight = torch.zeros(2, 4, C), torch.zeros(C, 3)
    for arguments, text in (
        ({"weight": torch.zeros(C, 9)}, "W from 1 to 8"),
        ({"weight": torch.zeros(C, 3).double()}, "weight must have x's dtype"),
        ({"x": torch.zeros(4, C)}, r"\[B, T, C\]"),
        ({"activation": "relu"}, "None or 'silu', got 'relu'"),
        ({"initial_state": torch.zeros(2, C, 3)}, r"\(2, 3, 2\)"),
        ({"bias": torch.zeros(4)}, r"bias must be \[C\]"),
        ({"cu_seqlens": (0, 4)}, "batch must be 1"),
        ({"sp": 3}, "sp must be a SequenceParallel"),
    ):
        with pytest.raises(ValueError, match=text):
            lasp.short_convolution(**{"x": x, "weight": weight, **arguments})


def test_packed_documents_compile_without_a_word() -> None:
    """The graph breaks around the rows' plan, which the compiler would trace, with a page of warnings."""
    x, weight = (torch.randn(*shape, requires_grad=True) for shape in ((1, 20, 8), (8, 4)))

    def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return 2 * lasp.short_convolution(2 * x, weight, activation="silu", cu_seqlens=(0, 3, 11, 20))[0]

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo detected")
        compiled = torch.compile(convolve, backend="aot_eager")(x, weight)
    assert torch.equal(compiled, convolve(x, weight))
    (d_compiled,), (d_eager,) = (torch.autograd.grad(y.sum(), x) for y in (compiled, convolve(x, weight)))
    assert relative_error(d_compiled, d_eager) < 1e-6
