"""Sliding windows, soft caps and sinks of softmax attention, against the whole matrix of scores in fp64."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from tolerances import relative_error
from torch import Tensor
from world import run

import lasp
from lasp.softmax import exchange as softmax_exchange
from lasp.softmax import functions as softmax_functions
from lasp.softmax.blocks import blocks_of

BOUND = 1e-12
# Shards shorter than windows, empty ones, one token.
LENGTHS = {2: ((11, 10), (1, 20), (21, 0)), 3: ((7, 7, 7), (2, 0, 19), (9, 3, 9)), 4: ((3, 1, 2, 15),)}
DOCUMENTS = (0, 2, 13, 14, 21)


class Scores(NamedTuple):
    """Says how scores are made. sinks: whether there are some."""

    window: int | None
    softcap: float | None = None
    sinks: bool = False

    def options(self, given: dict[str, Tensor]) -> dict[str, Any]:
        return {"window": self.window, "softcap": self.softcap, "sinks": given["sinks"] if self.sinks else None}


# A window of one token, of a few, longer than two shards, longer than all.
KINDS = (
    Scores(1), Scores(4), Scores(9), Scores(50), Scores(9, 2.0, True), Scores(None, 0.7), Scores(None, None, True),
)  # fmt: skip


def problem(tokens: int, heads: int, key_heads: int, batch: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {
        "q": (batch, tokens, heads, 4), "k": (batch, tokens, key_heads, 4), "v": (batch, tokens, key_heads, 3),
        "sinks": (heads,), "d_o": (batch, tokens, heads, 3),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}


def by_matrix(given: dict[str, Tensor], kind: Scores, bounds: tuple[int, ...]) -> dict[str, Tensor]:
    """Outputs and gradients, of the softmax of one matrix with a column for the sink."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("q", "k", "v", "sinks")}
    tokens, group = given["q"].shape[1], given["q"].shape[2] // given["k"].shape[2]
    k, v = (leaves[name].repeat_interleave(group, 2) for name in "kv")
    scores = torch.einsum("bthd,bshd->bhts", leaves["q"], k) / 2
    if kind.softcap is not None:
        scores = kind.softcap * (scores / kind.softcap).tanh()
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    document = torch.bucketize(torch.arange(tokens), torch.tensor(bounds[1:]), right=True)
    seen = (s <= t) & (document[:, None] == document)
    if kind.window is not None:
        seen &= t - s < kind.window
    scores = scores.masked_fill(~seen, -torch.inf)
    if kind.sinks:
        column = leaves["sinks"][:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    o = torch.einsum("bhts,bshd->bthd", scores.softmax(-1)[..., :tokens], v)
    o.backward(given["d_o"])
    return {"o": o.detach(), **{f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def errors(sp: Any, given: dict[str, Tensor], expected: dict[str, Tensor], kind: Scores, **options: Any) -> float:
    """The largest of this rank's; gradients of sinks are shares."""
    leaves = {name: (given[name] if sp is None else sp.shard(given[name])).clone() for name in "qkv"}
    sinks = given["sinks"].clone().requires_grad_()
    for leaf in leaves.values():
        leaf.requires_grad_()
    options |= kind.options({**given, "sinks": sinks})
    o, _ = lasp.softmax_attention(*leaves.values(), sp=sp, **options)
    o.backward(given["d_o"] if sp is None else sp.shard(given["d_o"]))

    def part(tensor: Tensor) -> Tensor:
        return tensor if sp is None else sp.shard(tensor)

    found = [relative_error(o, part(expected["o"]))]
    found += [relative_error(leaf.grad, part(expected[f"d_{name}"])) for name, leaf in leaves.items()]
    if kind.sinks:
        found.append(relative_error(sinks.grad if sp is None else sp.sum(sinks.grad), expected["d_sinks"]))
    return max(found)


@pytest.mark.parametrize("size", [3, *(pytest.param(size, marks=pytest.mark.ci) for size in (2, 4))])
def test_over_ranks(size: int) -> None:
    heads = (2 * size, size)  # ranks of ulysses have key heads of their own
    cases = []
    for kind, packed in itertools.product(KINDS, (False, True)):
        given = problem(21, *heads, batch=1 if packed else 2)
        bounds = DOCUMENTS if packed else (0, 21)
        cases.append((kind, bounds if packed else None, given, by_matrix(given, kind, bounds)))

    def work(rank: int) -> list[Any]:
        base = lasp.SequenceParallel(dist.group.WORLD)
        failures = []
        for (kind, bounds, given, expected), lengths, method in itertools.product(
            cases, LENGTHS[size], ("all_gather", "ulysses")
        ):
            error = errors(base.with_lengths(lengths), given, expected, kind, cu_seqlens=bounds, method=method)
            failures += [(kind, bounds, lengths, method, error)] if not error < BOUND else []
        return failures

    assert [failure for failures in run(size, work) for failure in failures] == []


def late(k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    return [tensor.roll(1, 1) for tensor in softmax_exchange.gather_window(k, v, *rest)]


def without_gradients(k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    whole = softmax_exchange.gather_window(k, v, *rest)
    own = k.shape[1]
    return [
        torch.cat((all_rows[:, : -own or None].detach(), rows), 1) for all_rows, rows in zip(whole, (k, v), strict=True)
    ]


@pytest.mark.parametrize("mistake", [late, without_gradients])
def test_mistakes_are_seen(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: keys that are a token late, or that give no gradients back to their ranks."""
    given, kind = problem(21, 4, 2, batch=2), Scores(9)
    expected = by_matrix(given, kind, (0, 21))

    def work(rank: int) -> float:
        monkeypatch.setattr(softmax_functions, "gather_window", mistake)
        return errors(lasp.SequenceParallel(dist.group.WORLD, lengths=(7, 7, 7)), given, expected, kind)

    assert max(run(3, work)) > 1e-2


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_without_ranks(backend: str) -> None:
    """Covers many tiles, of documents that differ; the control is a window that is a token too long."""
    for kind, tokens, bounds in itertools.product(KINDS, (21,), (DOCUMENTS, (0, 21))):
        given = problem(tokens, 4, 2, batch=1)
        expected = by_matrix(given, kind, bounds)
        assert errors(None, given, expected, kind, cu_seqlens=bounds, backend=backend) < BOUND
        if kind.window == 4:
            wrong = kind._replace(window=5)
            assert errors(None, given, expected, wrong, cu_seqlens=bounds, backend=backend) > 1e-3
    for kind, bounds in itertools.product((Scores(70), Scores(70, 2.0, True)), ((0, 3, 200, 400), None)):
        given = problem(400, 2, 1, batch=1 if bounds else 2)
        expected = by_matrix(given, kind, bounds or (0, 400))
        assert errors(None, given, expected, kind, cu_seqlens=bounds, backend=backend) < BOUND


def test_tiles_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow so few scores at a time that queries, and documents, are cut into several."""
    monkeypatch.setattr("lasp.softmax.scores._TILE_SCORES", 100)
    for kind in (Scores(None, 2.0, True), Scores(9, 2.0)):
        for bounds in (DOCUMENTS, (0, 21), tuple(range(0, 22, 7))):
            given = problem(21, 4, 2, batch=1)
            assert errors(None, given, by_matrix(given, kind, bounds), kind, cu_seqlens=bounds) < BOUND


def test_states_and_windows() -> None:
    """Rows before the first token count as tokens; final states are whole, whatever the window."""
    given = problem(21, 4, 2, batch=2)
    kind = Scores(9, None, True)
    o = by_matrix(given, kind, (0, 21))["o"]

    def work(rank: int) -> list[float]:
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=(5, 10))
        rows = torch.cat((given["k"], given["v"]), -1)
        found = []
        for method in ("all_gather", "ulysses"):
            later = [sp.shard(given[name][:, 6:]) for name in "qkv"]
            got, final = lasp.softmax_attention(
                *later, **kind.options(given), initial_state=rows[:, :6], output_final_state=True, sp=sp, method=method
            )
            found += [relative_error(got, sp.shard(o[:, 6:])), relative_error(final, rows)]
        return found

    assert max(max(found) for found in run(2, work)) < BOUND


def test_messages_and_calls_do_not_grow_with_the_sequence() -> None:
    def work(rank: int) -> list[int]:
        sp, sent = lasp.SequenceParallel(dist.group.WORLD), []
        for tokens in (60, 600):
            given = problem(tokens, 2, 2, batch=1)
            leaves = [sp.shard(given[name]).clone().requires_grad_() for name in "qkv"]
            before = sp.counters.sent_bytes
            lasp.softmax_attention(*leaves, window=9, sp=sp)[0].sum().backward()
            sent.append(sp.counters.sent_bytes - before)
        return sent

    assert all(short == long for short, long in run(3, work))
    # All full tiles of all documents are one call; what is left of each is few.
    blocks = blocks_of((0, 100_000, 300_000), (0, 0, 0), 0, 300_000, True, 1000).blocks
    assert len(blocks) <= 5 and max(block.queries * block.keys for block in blocks) <= 1000 * 2000


def test_what_means_nothing_is_refused() -> None:
    given = problem(5, 2, 2, batch=1)
    tensors = [given[name] for name in "qkv"]
    for options, message in (
        ({"window": 0}, "window must be"),
        ({"window": 2.5}, "window must be"),
        ({"window": 2, "causal": False}, "needs causal=True"),
        ({"softcap": 0.0}, "softcap must be"),
        ({"softcap": float("inf")}, "softcap must be"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[H\] = \[2\]"),
        ({"sinks": torch.zeros(2, 1)}, r"sinks must be \[H\]"),
    ):
        with pytest.raises(ValueError, match=message):
            lasp.softmax_attention(*tensors, **options)
