"""Softmax attention across ranks, against the whole matrix of scores on one device: fp64, all gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from exchange.simulated import run as simulate
from exchange.simulated import sequence_parallel
from tolerances import relative_error
from torch import Tensor
from world import run

import lasp
from lasp.softmax import exchange as softmax_exchange
from lasp.softmax import functions as softmax_functions
from lasp.softmax.blocks import Blocks, blocks_of
from lasp.softmax.local import align_gradient, aligned, attend
from lasp.softmax.scores import ScoreOptions

BOUND = 1e-12
D, DV = 4, 3
LENGTHS = {
    1: [(12,)],
    2: [(6, 6), (12, 0), (0, 12), (1, 11)],
    3: [(4, 4, 4), (0, 9, 3), (10, 1, 1)],
    4: [(3, 3, 3, 3), (7, 0, 4, 1)],
}
# Query and key heads by number of ranks: one key head a query head, shared ones, and for ulysses ranks that share a
# key head and ranks whose queries use two key heads unevenly.
HEADS = {1: [(2, 1)], 2: [(2, 2), (6, 3)], 3: [(3, 3), (6, 2)], 4: [(4, 2), (8, 8)]}


def problem(
    tokens: int, heads: int, key_heads: int, *, batch: int = 2, before: int = 0, values: int = DV, seed: int = 0
):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    return {
        "q": normal(batch, tokens, heads, D), "k": normal(batch, tokens, key_heads, D),
        "v": normal(batch, tokens, key_heads, values), "initial_state": normal(batch, before, key_heads, D + values),
        "d_o": normal(batch, tokens, heads, values), "d_final": normal(batch, before + tokens, key_heads, D + values),
    }  # fmt: skip


def by_matrix(
    given, causal: bool, with_states: bool = True, offset: int = 0, scale: float = D**-0.5
) -> dict[str, Tensor]:
    """softmax of the whole masked matrix. offset: a control, how many tokens too far the mask lets one see."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("q", "k", "v", "initial_state")}
    before, tokens = given["initial_state"].shape[1], given["q"].shape[1]
    group = given["q"].shape[2] // given["k"].shape[2]
    whole = torch.cat((leaves["initial_state"], torch.cat((leaves["k"], leaves["v"]), -1)), 1)
    k, v = (t.repeat_interleave(group, 2) for t in (whole[..., :D], whole[..., D:]))
    scores = torch.einsum("bthd,bshd->bhts", leaves["q"], k) * scale
    t, s = torch.arange(tokens)[:, None], torch.arange(-before, tokens)
    seen = (s <= t + offset) if causal else torch.ones(tokens, before + tokens, dtype=torch.bool)
    o = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    if with_states:
        torch.autograd.backward((o, whole), (given["d_o"], given["d_final"]))
    else:
        o.backward(given["d_o"])
    gradients = {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
    return {"o": o.detach(), "final": whole.detach(), **gradients}


def errors(sp, given, expected, *, states: bool, **options) -> dict[str, float]:
    """This rank's errors, all ranks but the last giving a share of the final state's gradient."""
    leaves = {name: sp.shard(given[name]).clone().requires_grad_() for name in "qkv"}
    if states:
        initial = given["initial_state"].clone().requires_grad_()
        o, final = lasp.softmax_attention(
            *leaves.values(), initial_state=initial, output_final_state=True, sp=sp, **options
        )
        if sp.rank == sp.size - 1 > 0:  # a rank that makes no use of the state must not keep the others waiting
            o.backward(sp.shard(given["d_o"]))
        else:
            share = given["d_final"] / max(1, sp.size - 1)
            torch.autograd.backward((o, final), (sp.shard(given["d_o"]), share))
    else:
        o, final = lasp.softmax_attention(*leaves.values(), sp=sp, **options)
        assert final is None
        o.backward(sp.shard(given["d_o"]))
    result = {"o": relative_error(o, sp.shard(expected["o"]))}
    for name, leaf in leaves.items():
        result[f"d_{name}"] = relative_error(leaf.grad, sp.shard(expected[f"d_{name}"]))
    if states:
        d_initial = expected["d_initial_state"] if sp.rank == 0 else torch.zeros_like(initial)
        result["final"] = relative_error(final, expected["final"])
        result["d_initial_state"] = relative_error(initial.grad, d_initial)
    return result


@pytest.mark.parametrize("size", LENGTHS)
def test_equals_one_device(size):
    cases = []
    for lengths, (heads, key_heads), causal, before in itertools.product(
        LENGTHS[size], HEADS[size], (True, False), (0, 5)
    ):
        given = problem(sum(lengths), heads, key_heads, before=before)
        cases.append((lengths, causal, given, before > 0, by_matrix(given, causal, with_states=before > 0)))

    def work(rank: int) -> list:
        base = lasp.SequenceParallel(dist.group.WORLD)
        failures = []
        for (lengths, causal, given, states, expected), method in itertools.product(cases, ("all_gather", "ulysses")):
            sp = base.with_lengths(lengths)
            found = errors(sp, given, expected, states=states, causal=causal, method=method)
            what = (lengths, given["q"].shape[2], causal, states, method)
            failures += [(*what, name, error) for name, error in found.items() if not error < BOUND]
        return failures

    assert [failure for failures in run(size, work) for failure in failures] == []


def test_any_scale():
    """Negative and zero, which kernels do not take: on two ranks, by both methods and backends, with and without rows
    before."""
    cases = []
    for scale, causal, before in itertools.product((-1.0, 0.0, -0.0, 1e-30), (True, False), (0, 3)):
        given = problem(8, 2, 2, before=before, values=D)  # as wide as keys, which PyTorch's fastest kernels want
        expected = by_matrix(given, causal, with_states=before > 0, scale=scale)
        cases.append((given, expected, before > 0, {"causal": causal, "scale": scale}))

    def work(rank: int) -> list:
        sp = lasp.SequenceParallel(dist.group.WORLD)
        return [
            (options, method, backend, name, error)
            for given, expected, states, options in cases
            for method, backend in itertools.product(("all_gather", "ulysses"), ("torch", "reference"))
            for name, error in errors(
                sp, given, expected, states=states, method=method, backend=backend, **options
            ).items()
            if not error < BOUND
        ]

    assert [failure for failures in run(2, work) for failure in failures] == []
    given, expected, states, _ = cases[0]
    positive = by_matrix(given, True, with_states=states, scale=1.0)
    assert relative_error(positive["o"], expected["o"]) > 0.1, "the control: the sign matters"


def test_reference_rounds_last():
    """The definition must not round scores of 50, off by 0.1 in bf16, before it takes their exponential."""
    given = problem(9, 4, 2)
    q, k, v = ((8 * given[name] if name != "v" else given[name]).bfloat16() for name in "qkv")
    exact, _ = lasp.softmax_attention(q.double(), k.double(), v.double(), backend="reference")
    o, _ = lasp.softmax_attention(q, k, v, backend="reference")
    assert o.dtype == torch.bfloat16
    assert relative_error(o, exact) < 1.2 * relative_error(exact.bfloat16(), exact)


def test_inputs_that_lie_beside_what_kernels_read():
    """A part of wider rows, every other column, rows that begin beside an address of 16 bytes: read as if they were
    alone. CUDA's kernels end the process for them (on a GPU they do so here)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wide = torch.randn(3, 2, 9, 4, 37, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    moved = torch.randn(2 * 9 * 4 * 16 + 1, device=device).bfloat16()[1:].view(2, 9, 4, 16)
    for part in (wide[..., 3:35], wide[..., ::2], wide[..., 5:21], moved.expand(3, *moved.shape)):
        given = [x.detach().requires_grad_() for x in part]
        alone = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in part]
        for x, copy in zip(given, alone, strict=True):
            read = aligned(x)
            assert torch.equal(read, x) and read.data_ptr() % 16 == 0
            assert read.stride(-1) == 1 and (x.shape[-1] % 8 != 0 or all(s % 8 == 0 for s in read.stride()[:-1]))
            assert aligned(copy) is copy  # the control
        (found, _), (expected, _) = lasp.softmax_attention(*given), lasp.softmax_attention(*alone)
        assert relative_error(found, expected) < 5e-3  # by other kernels, on a CPU
        d_o = wide[0, ..., : found.shape[-1]]
        for d, d_alone in zip(
            torch.autograd.grad(found, given, d_o), torch.autograd.grad(expected, alone, d_o.clone()), strict=True
        ):
            assert relative_error(d, d_alone) < 8e-3


@pytest.mark.parametrize("mended", [True, False])
def test_gradients_that_lie_beside_what_kernels_read(mended):
    """Takes that of a concatenation, which does; the control is one that is not seen to."""
    x = torch.randn(2, 9, 4, 16).bfloat16().requires_grad_()
    o, seen = x * 1, []
    if mended:
        align_gradient(o)
    o.register_hook(seen.append)
    d = torch.randn(2, 9, 4, 19).bfloat16()
    torch.cat((torch.zeros(2, 9, 4, 3).bfloat16(), o), -1).backward(d)
    assert torch.equal(x.grad, d[..., 3:])
    assert (seen[0].storage_offset() % 8 == 0 and all(s % 8 == 0 for s in seen[0].stride()[:-1])) == mended


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_without_ranks(backend):
    given = problem(9, 4, 2, before=3)
    expected = by_matrix(given, True)
    o, final = lasp.softmax_attention(
        *(given[name] for name in "qkv"), initial_state=given["initial_state"], output_final_state=True,
        backend=backend,
    )  # fmt: skip
    assert relative_error(o, expected["o"]) < BOUND and torch.equal(final, expected["final"])
    assert relative_error(o, by_matrix(given, True, offset=-1)["o"]) > 1e-2
    # One token at a time, the state growing.
    state, outputs = given["initial_state"], []
    for t in range(9):
        part, state = lasp.softmax_attention(
            *(given[name][:, t : t + 1] for name in "qkv"), initial_state=state, output_final_state=True
        )
        outputs.append(part)
    assert relative_error(torch.cat(outputs, 1), expected["o"]) < BOUND and torch.equal(state, expected["final"])
    nothing, _ = lasp.softmax_attention(*(given[name][:, :0].requires_grad_() for name in "qkv"))
    assert nothing.shape == (2, 0, 4, DV) and nothing.requires_grad


TOKENS, RANKS = 12, 4
# Rows of the initial state that a document which starts at each token brings along.
ROWS = (2, 0, 1, 3, 0, 0, 1, 1, 2, 0, 1, 2)
FIRST_ROW = (0, *itertools.accumulate(ROWS))


class Cut:
    """One way to cut 12 tokens into documents, with a state for each.

    Attributes:
        bounds: cu_seqlens. before: initial_cu_seqlens.
        rows: of the states that all cuts share, those of this one.
        final: of those states' rows and then the tokens, the rows of the final state.
    """

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        # Empty documents bring no rows along; the one after them, which starts there too, does.
        counts = [ROWS[start] if start < end else 0 for start, end in itertools.pairwise(bounds)]
        self.before = (0, *itertools.accumulate(counts))
        self.rows, self.final = [], []
        for start, end in itertools.pairwise(bounds):
            own = list(range(FIRST_ROW[start], FIRST_ROW[start + 1])) if start < end else []
            self.rows += own
            self.final += own + [FIRST_ROW[-1] + t for t in range(start, end)]

    def mask(self) -> Tensor:
        """[12, rows + 12]: what each token sees."""
        seen = torch.zeros(TOKENS, FIRST_ROW[-1] + TOKENS, dtype=torch.bool)
        for start, end in itertools.pairwise(self.bounds):
            for t in range(start, end):
                seen[t, FIRST_ROW[start] : FIRST_ROW[start + 1]] = True
                seen[t, FIRST_ROW[-1] + start : FIRST_ROW[-1] + t + 1] = True
        return seen


def cuts_by_matrix(given, cuts: list[Cut], d_final: Tensor, with_rows: bool) -> dict[str, Tensor]:
    """Outputs and gradients of every cut, all in one masked matrix: a leading dim of cuts, in place of B.

    d_final: of each row and token. with_rows: with the states, of which otherwise nothing is seen.
    """
    leaves = {
        name: given[name].expand(len(cuts), -1, -1, -1).clone().requires_grad_()
        for name in ("q", "k", "v", "initial_state")
    }
    group = given["q"].shape[2] // given["k"].shape[2]
    whole = torch.cat((leaves["initial_state"], torch.cat((leaves["k"], leaves["v"]), -1)), 1)
    k, v = (t.repeat_interleave(group, 2) for t in whole.split((D, DV), -1))
    scores = torch.einsum("bthd,bshd->bhts", leaves["q"], k) * D**-0.5
    seen = torch.stack([cut.mask() for cut in cuts])
    if not with_rows:
        seen[:, :, : FIRST_ROW[-1]] = False
    o = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)
    outputs, gradients = [o], [given["d_o"].expand_as(o)]
    if with_rows:
        outputs, gradients = [*outputs, whole], [*gradients, d_final.expand_as(whole)]
    torch.autograd.backward(outputs, gradients)
    return {"o": o.detach(), "final": whole.detach(), **{f"d_{name}": leaf.grad for name, leaf in leaves.items()}}


def run_cuts(method: str, cuts: list[Cut], lengths: tuple[int, ...], with_rows: bool) -> float:
    """The largest error of any rank in outputs, gradients and, with rows, states, over `cuts`."""
    given = problem(TOKENS, 4, 2, batch=1, before=FIRST_ROW[-1])
    d_final = given["d_final"]
    expected = cuts_by_matrix(given, cuts, d_final, with_rows)

    def work(comm) -> float:
        worst, sp = 0.0, sequence_parallel(comm, "ring", lengths)
        for index, cut in enumerate(cuts):
            solution = {name: t[index : index + 1] for name, t in expected.items()}
            here, options = given, {"cu_seqlens": cut.bounds, "method": method}
            if with_rows:
                here = {**given, "initial_state": given["initial_state"][:, cut.rows], "d_final": d_final[:, cut.final]}
                solution["d_initial_state"] = solution["d_initial_state"][:, cut.rows]
                solution["final"] = solution["final"][:, cut.final]
                options["initial_cu_seqlens"] = cut.before
            worst = max(worst, *errors(sp, here, solution, states=with_rows, **options).values())
        return worst

    return max(simulate(RANKS, work))


def every_cut(step: int, first: int = 0) -> list[Cut]:
    """Every `step`-th of the 2^11 ways to cut 12 tokens into documents."""
    return [
        Cut((0, *(t for t in range(1, TOKENS) if number >> (t - 1) & 1), TOKENS))
        for number in range(first, 2 ** (TOKENS - 1), step)
    ]


# Every 17th, and all of them, in parts that test processes can share, where that is asked for (`make exhaustive`).
@pytest.mark.parametrize(
    ("step", "first"), [(17, 0), *(pytest.param(4, part, marks=pytest.mark.exhaustive) for part in range(4))]
)
@pytest.mark.parametrize("method", ["all_gather", pytest.param("ulysses", marks=pytest.mark.ci)])
def test_every_set_of_boundaries(method, step, first):
    """T = 12 over 4 ranks, all 2^11 ways to cut it into documents: outputs and all gradients."""
    assert run_cuts(method, every_cut(step, first), (3, 3, 3, 3), with_rows=False) < BOUND


@pytest.mark.parametrize("method", ["all_gather", pytest.param("ulysses", marks=pytest.mark.ci)])
def test_states_of_documents(method):
    """Each document's keys and values before and after, in every 31st cut and with empty documents; ragged shards."""
    empty = [Cut((0, 0, 3, 3, 12, 12)), Cut((0, 3, 6, 9, 12))]
    assert run_cuts(method, [*every_cut(31), *empty], (1, 0, 2, 9), with_rows=True) < BOUND
    assert run_cuts(method, empty, (3, 3, 3, 3), with_rows=False) < BOUND


def test_a_boundary_misplaced_by_a_token_is_seen():
    """The control: cut one token later than expected."""
    cut = Cut((0, 6, 12))
    cut.mask = Cut((0, 5, 12)).mask
    assert run_cuts("all_gather", [cut], (3, 3, 3, 3), with_rows=False) > 1e-2


def test_states_of_other_documents_are_not_seen():
    """The control: the rows of the wrong document give something else."""
    given = problem(TOKENS, 4, 2, batch=1, before=2)
    o, _ = lasp.softmax_attention(
        *(given[name] for name in "qkv"), initial_state=given["initial_state"], cu_seqlens=(0, 6, 12),
        initial_cu_seqlens=(0, 1, 2),
    )  # fmt: skip
    alone, _ = lasp.softmax_attention(
        *(given[name][:, 6:] for name in "qkv"), initial_state=given["initial_state"][:, 1:]
    )
    other, _ = lasp.softmax_attention(
        *(given[name][:, 6:] for name in "qkv"), initial_state=given["initial_state"][:, :1]
    )
    assert relative_error(o[:, 6:], alone) < BOUND and relative_error(o[:, 6:], other) > 1e-2
    # Rows of a document without tokens pass on, and no other sees them.
    o, final = lasp.softmax_attention(
        *(given[name] for name in "qkv"), initial_state=given["initial_state"], output_final_state=True,
        cu_seqlens=(0, 0, 12), initial_cu_seqlens=(0, 2, 2),
    )  # fmt: skip
    assert torch.equal(final[:, :2], given["initial_state"]) and torch.equal(final[:, 2:, :, :D], given["k"])
    assert relative_error(o, lasp.softmax_attention(*(given[name] for name in "qkv"))[0]) < BOUND


def test_a_document_of_nan_reaches_no_other():
    bounds = (0, 2, 5, 6, 6, 11, 12)
    given = problem(12, 4, 2, batch=1)

    def work(comm):
        sp = sequence_parallel(comm, "ring", (4, 1, 0, 7))
        clean = []
        for method, (start, end) in itertools.product(("all_gather", "ulysses"), itertools.pairwise(bounds)):
            here = torch.ones(12, dtype=torch.bool)
            here[start:end] = False
            leaves = []
            for name in "qkv":
                poisoned = given[name].clone()
                poisoned[:, start:end] = torch.nan
                leaves.append(sp.shard(poisoned).clone().requires_grad_())
            o, _ = lasp.softmax_attention(*leaves, cu_seqlens=bounds, sp=sp, method=method)
            o.sum().backward()
            others = sp.shard(here, 0)
            clean += [t[:, others].isfinite().all() for t in (o, *(leaf.grad for leaf in leaves))]
            clean.append(o[:, ~others].isnan().all())
        return torch.stack(clean).all()

    assert all(simulate(4, work))


def test_later_ranks_are_not_seen():
    given = problem(12, 3, 3)

    def work(rank: int) -> bool:
        sp = lasp.SequenceParallel(dist.group.WORLD)
        q, k, v = (sp.shard(given[name]) for name in "qkv")
        clean, _ = lasp.softmax_attention(q, k, v, sp=sp, method="all_gather")
        if rank == 2:
            k, v = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
        return torch.equal(clean, lasp.softmax_attention(q, k, v, sp=sp, method="all_gather")[0])

    assert run(3, work) == [True, True, False]


def test_thousands_of_documents_are_few_calls():
    bounds = tuple(range(4097))
    assert len(blocks_of(bounds, (0,) * len(bounds), 1000, 3000, True).blocks) == 1
    lengths = [n % 37 + 1 for n in range(500)]
    bounds = (0, *itertools.accumulate(lengths))
    blocks, order = blocks_of(bounds, (0,) * len(bounds), 0, bounds[-1], True)
    assert len(blocks) == 37 and sorted(order.tolist()) == list(range(bounds[-1]))


def test_inference_and_autocast_leave_no_trace():
    """Blocks made while generating serve training; inside autocast the arguments' dtype is kept."""
    q, k, v = (problem(10, 4, 2, batch=1)[name].float().requires_grad_() for name in "qkv")
    bounds = (0, 3, 6, 10)
    with torch.inference_mode():
        lasp.softmax_attention(q, k, v, cu_seqlens=bounds)
    o, _ = lasp.softmax_attention(q, k, v, cu_seqlens=bounds)
    o.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("torch", "reference"):
            again, _ = lasp.softmax_attention(q, k, v, cu_seqlens=bounds, backend=backend)
            assert again.dtype == torch.float32 and relative_error(again, o) < 1e-6


MISTAKES = {
    "none": lambda patch: None,
    "wrong causal offset": lambda patch: patch.setattr(
        softmax_functions,
        "blocks_of",
        lambda bounds, before, first, last, *rest: blocks_of(bounds, before, 0, last - first, *rest),
    ),
    "one key too few": lambda patch: patch.setattr(
        softmax_functions,
        "gather",
        lambda k, v, *rest, **options: [t.roll(1, 1) for t in softmax_exchange.gather(k, v, *rest, **options)],
    ),
    "others' gradients dropped": lambda patch: patch.setattr(softmax_exchange, "_sum", lambda parts: parts[0]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake, monkeypatch):
    """The control: each fails the same comparison by far."""
    given = problem(12, 4, 2)
    expected = by_matrix(given, True, with_states=False)

    def work(rank: int) -> dict[str, float]:
        MISTAKES[mistake](monkeypatch)
        return errors(lasp.SequenceParallel(dist.group.WORLD), given, expected, states=False)

    results = run(3, work)
    worst = {name: max(result[name] for result in results) for name in results[0]}
    assert (worst["o"] > 1e-2) == (mistake in ("wrong causal offset", "one key too few")), worst
    assert (worst["d_k"] > 1e-2) == (mistake != "none"), worst


def test_bytes_equal_the_formula():
    """all_gather: keys and values to all, their gradients back to those before; ulysses: the heads that others need.
    Which of them "auto" is."""
    size, tokens, heads, key_heads, number = 4, 5, 8, 4, 4
    row = key_heads * (D + DV) * number

    def step(sp, tokens: int, **options) -> tuple[int, int, int, int]:
        leaves = [torch.randn(2, tokens, h, d, requires_grad=True) for h, d in
                  ((heads, D), (key_heads, D), (key_heads, DV))]  # fmt: skip
        sp.counters.reset()
        o, _ = lasp.softmax_attention(*leaves, sp=sp, **options)
        forward = sp.counters.sent_bytes, sp.counters.received_bytes
        o.sum().backward()
        return *forward, sp.counters.sent_bytes - forward[0], sp.counters.received_bytes - forward[1]

    def work(rank: int) -> None:
        sp = lasp.SequenceParallel(dist.group.WORLD)
        gathered, shard = (size - 1) * 2 * tokens * row, 2 * tokens * row
        assert step(sp, tokens, method="all_gather") == (gathered, gathered, rank * shard, (size - 1 - rank) * shard)
        assert step(sp, tokens, causal=False) == (gathered, gathered, gathered, gathered)
        moved = 2 * tokens * (heads * D + key_heads * (D + DV) + heads * DV) * number * (size - 1) // size
        assert step(sp, tokens, method="ulysses") == (moved, moved, moved, moved)
        assert step(sp, tokens) == (moved, moved, moved, moved)
        assert step(sp, tokens, window=tokens) != (moved, moved, moved, moved)
        # Ragged: messages of all ranks are as long as the longest; gradients are not.
        lengths = (1, 0, 6, 2)
        found = step(sp.with_lengths(lengths), lengths[rank], method="all_gather")
        back = 2 * row * sum(lengths[:rank]), 2 * row * lengths[rank] * (size - 1 - rank)
        assert found == (3 * 2 * 6 * row, 3 * 2 * 6 * row, *back)

    run(size, work)


def test_ranks_that_differ_and_wrong_arguments():
    def work(rank: int) -> list[str]:
        messages = []
        for arguments in (
            {"causal": bool(rank)},
            {"v": torch.zeros(1, 4, 2, 3 + rank)},
            {"cu_seqlens": (0, 3 + rank, 8)},
            {"method": "ulysses" if rank else "all_gather"},
            {"k": torch.zeros(1, 4, 2, 3, requires_grad=bool(rank))},
            {"method": "ring"},
            {name: torch.zeros(1, 4, 3, 3) for name in "qkv"} | {"method": "ulysses"},
        ):
            sp = lasp.SequenceParallel(dist.group.WORLD, timeout_s=20)
            tensors = {name: torch.zeros(1, 4, 2, 3) for name in "qkv"}
            try:
                lasp.softmax_attention(**{**tensors, "sp": sp, **arguments})  # type: ignore[arg-type]
            except (lasp.ExchangeError, ValueError) as error:
                messages.append(str(error))
        return messages

    for messages in run(2, work):
        for text, message in zip(
            ("causal", "D and D_v: rank 0 has", "documents", "method", "requires_grad",
             "known: auto, all_gather, ulysses", "the 3 query heads must be a multiple of the 2 ranks"),
            messages, strict=True,
        ):  # fmt: skip
            assert text in message, message

    good = {name: torch.zeros(1, 4, 2, 3) for name in "qkv"}
    for arguments, text in (
        ({"q": torch.zeros(1, 4, 3, 3)}, "q's heads must be a multiple of k's"),
        ({"k": torch.zeros(1, 5, 2, 3)}, "must agree in B, T, D and H_kv"),
        ({"v": torch.zeros(1, 4, 2, 3).double()}, "one dtype and device"),
        ({"q": torch.zeros(4, 2, 3)}, r"\[B, T, H, D\]"),
        ({"backend": "flash"}, "known: auto, torch, reference"),
        ({"initial_state": torch.zeros(1, 7, 2, 5)}, r"\[1, .., 2, 6\]"),
        ({"cu_seqlens": (0, 4), "initial_state": torch.zeros(1, 7, 2, 6)}, "which document has which rows"),
        ({"initial_cu_seqlens": (0, 4)}, "give cu_seqlens and initial_state"),
        (
            {"cu_seqlens": (0, 4), "initial_state": torch.zeros(1, 7, 2, 6), "initial_cu_seqlens": (0, 4, 7)},
            "as many numbers as cu_seqlens, 2; got 3",
        ),
        (
            {"cu_seqlens": (0, 4), "initial_state": torch.zeros(1, 7, 2, 6), "initial_cu_seqlens": (0, 6)},
            "initial_cu_seqlens must rise from 0 to the 7 tokens of initial_state",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            lasp.softmax_attention(**{**good, **arguments})


def test_a_graph_computes_in_the_dtype_asked_for_under_autocast() -> None:
    q, k, v = (torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    expected = lasp.softmax_attention(q, k, v)[0]
    torch._dynamo.reset()

    def attend(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return lasp.softmax_attention(*tensors)[0]

    found = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    assert found.dtype == torch.float32 and relative_error(found, expected) <= 1e-6
    rounded = lasp.softmax_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())[0]
    assert relative_error(rounded, expected) > 1e-4, "the control"


def test_gradients_of_a_rank_without_tokens_have_memory_of_their_own() -> None:
    """Collectives that add the shares of sinks write to them in place."""
    q, k, v = (torch.randn(1, tokens, 2, 8, requires_grad=True) for tokens in (0, 6, 6))
    sinks = torch.randn(2, requires_grad=True)
    o = attend(q, k, v, sinks, Blocks((), None), ScoreOptions(True, 1.0), backend="auto")
    for gradient in torch.autograd.grad(o, (q, k, v, sinks), torch.zeros_like(o)):
        assert gradient.is_contiguous() and not gradient.any()
