"""The Triton stages of the decay family against the chunked PyTorch backend in fp64, and against mutilated runs.

The interpreter takes milliseconds a program, so shapes are the smallest that reach every branch: several segments,
a ragged last chunk, grouped heads, dims that are no power of two, several slices of columns.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from tolerances import relative_error
from torch import Tensor

from lasp import linear_attention
from lasp.kernels.torch.decay import STAGES as exact
from lasp.kernels.triton.decay import plan as plans
from lasp.kernels.triton.decay import runs
from lasp.kernels.triton.decay.channel import launches as channel
from lasp.kernels.triton.decay.channel import stages as channel_stages
from lasp.kernels.triton.decay.channel import through as channel_through
from lasp.kernels.triton.decay.intervals import INTERVALS
from lasp.kernels.triton.decay.launches import RunShape
from lasp.kernels.triton.decay.scalar import launches as scalar
from lasp.kernels.triton.decay.scalar import sweep
from lasp.kernels.triton.decay.scalar import sweep_row_major as rows_module
from lasp.kernels.triton.decay.stages import STAGES as fused
from lasp.recurrence.inputs import DecayInputs
from lasp.recurrence.stages import AnyStages

KINDS = ("none", "constant", "scalar", "channel")
# fp32: the policy's bound. 16 bits: their rounding, 2^-11 and 2^-8, of inputs to products and of outputs.
BOUNDS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 5e-3}


class Problem(NamedTuple):
    x: DecayInputs
    state_in: Tensor
    d_o: Tensor
    d_state_out: Tensor


class Dims(NamedTuple):
    B: int = 1
    T: int = 150
    H: int = 1
    H_v: int = 2
    K: int = 16
    V: int = 16


def problem(kind: str, dims: Dims, device: torch.device, dtype: torch.dtype, strongest: float = 0.1) -> Problem:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    B, T, H, H_v, K, V = dims
    shape = {"none": None, "constant": (H_v,), "scalar": (B, T, H_v), "channel": (B, T, H_v, K)}[kind]
    g = None if shape is None else (-strongest * torch.rand(shape, generator=random)).to(device).requires_grad_()
    q, k, v, d_o = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H_v, V), normal(B, T, H_v, V)
    q, k, v, d_o = (tensor.to(device, dtype) for tensor in (q, k, v, d_o))
    return Problem(
        DecayInputs(q, k, v, g, K**-0.5), normal(B, H_v, K, V).to(device), d_o, normal(B, H_v, K, V).to(device)
    )


@torch.no_grad()
def run(backend: AnyStages, p: Problem) -> dict[str, Tensor]:
    """Every output and gradient of the stages, as the scan across ranks calls them."""
    state_in, d_o, d_state_out = p[1:]
    x = backend.prepare(p.x, False)
    summary, totals = backend.summarize(x)
    partial = backend.local_outputs(x, totals)
    o, saved = backend.outputs(x, totals, partial, state_in)
    adjoint, totals_adjoint = backend.summarize_adjoint(x, saved, d_o)
    local = backend.local_gradients(x, saved, totals_adjoint, d_o)
    dq, dk, dv, dg = backend.gradients(x, saved, totals_adjoint, local, d_o, d_state_out)
    results = {"o": o, "state_out": summary.apply(state_in), "d_state_in": adjoint.apply(d_state_out)}
    return results | {"dq": dq, "dk": dk, "dv": dv} | ({} if dg is None else {"dg": dg})


def solution(p: Problem) -> dict[str, Tensor]:
    """Solves in fp64, by the chunked backend, q's and k's heads repeated and their gradients summed."""
    x = p.x
    group = x.v.shape[2] // x.q.shape[2]
    q, k, v = (tensor.double() for tensor in (x.q, x.k, x.v))
    g = None if x.g is None else x.g.detach().double()
    wide = DecayInputs(q.repeat_interleave(group, 2), k.repeat_interleave(group, 2), v, g, x.scale)
    result = run(exact, Problem(wide, *(tensor.double() for tensor in p[1:])))
    for name in ("dq", "dk"):
        result[name] = result[name].unflatten(2, (-1, group)).sum(3)
    return result


def check(values: dict[str, Tensor], references: dict[str, Tensor], bound: float) -> None:
    assert values.keys() == references.keys()
    errors = {name: relative_error(values[name], references[name]) for name in values}
    # A gate's gradient is a sum over tokens, with cancellation; a constant's, one number a head, the more so.
    if "dg" in errors:
        errors["dg"] /= 4 if values["dg"].dim() == 1 else 2
    assert max(errors.values()) <= bound, errors


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks a segment, so that few tokens make several, and what bf16 inputs have: tensor descriptors, and
    gradients in rows where decays have some."""

    def short(*arguments: object) -> plans.LaunchPlan:
        p = plans.plan(*arguments)
        p = p._replace(segment_chunks=2, segments=max(1, -(-arguments[0] // (2 * p.chunk))))  # type: ignore[operator]
        return p._replace(descriptors=True, rows=True, scalar_keys=plans.Tiles(64, 4, 1))

    monkeypatch.setattr(runs, "plan", short)
    monkeypatch.setattr(runs, "launches_of", runs.launches_of.__wrapped__)


@pytest.mark.parametrize("kind", KINDS)
def test_all_results_fp32(kind: str, device: torch.device) -> None:
    p = problem(kind, Dims(), device, torch.float32)
    check(run(fused, p), solution(p), BOUNDS[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
def test_all_results_with_descriptors(kind: str, device: torch.device, short_segments: None) -> None:
    p = problem(kind, Dims(B=2, T=70, H=2, H_v=2, K=20, V=36), device, torch.float32)
    check(run(fused, p), solution(p), BOUNDS[torch.float32])


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("dims", [Dims(B=2, T=100, H=2), Dims(T=70, H=2, K=36, V=36)])
def test_gradients_of_keys_and_values_in_one_launch(
    kind: str, dims: Dims, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(kind, dims, device, torch.float32)
    p = p._replace(x=p.x._replace(g=None if p.x.g is None else p.x.g.detach()))
    monkeypatch.setattr(scalar, "PAIRED_CHUNKS", 1)
    monkeypatch.setattr(runs, "launches_of", runs.launches_of.__wrapped__)
    assert fused.prepare(p.x, False).launches.paired  # type: ignore[union-attr]
    references = solution(p)
    references.pop("dg", None)
    check(run(fused, p), references, BOUNDS[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [Dims(T=130, K=40, V=72), Dims(T=100, H=2, K=72, V=24)])
def test_all_results_bf16(kind: str, dims: Dims, device: torch.device) -> None:
    """Grouped heads, of which dims are unlike, and ungrouped ones; decays that are learned, in rows."""
    p = problem(kind, dims, device, torch.bfloat16)
    assert kind == "channel" or fused.prepare(p.x, False).launches.plan.rows
    check(run(fused, p), solution(p), BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("kind", KINDS)
def test_all_results_fp16(kind: str, device: torch.device) -> None:
    p = problem(kind, Dims(T=130, V=32), device, torch.float16)
    check(run(fused, p), solution(p), BOUNDS[torch.float16])


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_strong_gates(kind: str, device: torch.device) -> None:
    """Gates down to -20 among weak ones: neither overflow nor a difference of large sums."""
    p = problem(kind, Dims(T=70, H_v=1), device, torch.float32, strongest=20.0)
    values, references = run(fused, p), solution(p)
    # Its terms cancel: the error is relative to them, not to what is left.
    dg = relative_error(values.pop("dg"), references.pop("dg"))
    check(values, references, BOUNDS[torch.float32])
    assert dg <= 2e-5


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_hardly_any_tokens(kind: str, tokens: int, device: torch.device) -> None:
    p = problem(kind, Dims(T=tokens), device, torch.float32)
    values = run(fused, p)
    if tokens == 0:
        assert torch.equal(values["state_out"], p.state_in) and torch.equal(values["d_state_in"], p.d_state_out)
        assert values["o"].shape == p.x.v.shape and values["dq"].shape == p.x.q.shape
    else:
        check(values, solution(p), 2 * BOUNDS[torch.float32])


def test_gate_gradient_only_where_wanted(device: torch.device) -> None:
    p = problem("constant", Dims(T=70), device, torch.float32)
    unwanted = p._replace(x=p.x._replace(g=p.x.g.detach()))
    values, references = run(fused, unwanted), solution(p)
    references.pop("dg")
    check(values, references, BOUNDS[torch.float32])


@pytest.mark.parametrize("kind", ["constant", "scalar", "channel"])
@pytest.mark.parametrize("bad", [0.1, float("nan")])
def test_what_is_no_decay_gives_nan(kind: str, bad: float, device: torch.device) -> None:
    """NaN stands from its token on, in its head, and nowhere else."""
    p = problem(kind, Dims(T=70), device, torch.float32)
    g = p.x.g.detach().clone()
    token = 0 if kind == "constant" else 40
    (g if kind == "constant" else g[0, token])[1] = bad
    values = run(fused, p._replace(x=p.x._replace(g=g)))
    finite = values["o"].isfinite()
    assert finite[:, :, 0].all() and not finite[:, token:, 1].any()
    assert values["state_out"][:, 0].isfinite().all() and not values["state_out"][:, 1].isfinite().any()


@pytest.mark.parametrize(("dtype", "from_zero"), [(torch.float16, False), (torch.bfloat16, True)], ids=str)
def test_what_rounding_adds_to_a_gate_gradient_is_taken_off_where_it_is_known(
    dtype: torch.dtype, from_zero: bool, device: torch.device
) -> None:
    """The kernel alone, given sums that do not fit <S, D> at intervals' borders, as if much had been rounded: of two
    segments, the first of two intervals, the other of one; in one interval a chunk forgets. In bf16 that one's segment
    has short intervals."""
    C, interval = 64, 64 * INTERVALS[dtype][0]
    bounds, H_v, K = (0, interval, interval + 256, interval + 326), 2, 16
    p = plans.plan(bounds[-1], H_v, K, K, dtype, 2, 4, 1 << 20, True)
    p = p._replace(segment_chunks=(interval + 256) // C, segments=2)
    shape = RunShape((1, bounds[-1], 1, K), (1, bounds[-1], H_v, K), dtype, plans.TOKEN, True, 1.0, from_zero)
    launches = scalar.ScalarLaunches(shape, p)
    random = torch.Generator().manual_seed(0)
    shapes = (launches.sums, launches.sums, launches.inner, launches.state, launches.state)
    drawn = [torch.randn(shape, generator=random).to(device) for shape in shapes]
    q_sums, k_sums, inner, leaving, d_leaving = drawn
    inner = inner.to(launches.inner_dtype)
    prefix = torch.zeros(launches.gates, device=device)
    forgotten = 2
    prefix[:, :, (forgotten + 1) * C - 1] = -20.0
    prefix[:, :, (forgotten + 2) * C - 1] = -2.0  # which lets states pass, and wants short intervals
    formed = torch.randn(1, bounds[-1], H_v, generator=random).to(device)  # by `gate_pairs`, of the chunk that forgets
    dg = formed.clone()
    launches.gate_gradient(
        g_ptr=dg,
        prefix_ptr=prefix,
        q_sums_ptr=q_sums,
        k_sums_ptr=k_sums,
        inner_ptr=inner,
        state_out_ptr=leaving,
        dg_ptr=dg,
        dw_ptr=dg,
        places_ptr=dg,
        d_state_out_ptr=None if from_zero else d_leaving,
    )
    # Where a segment's states are is known from its first chunk and number.
    places = (0, 1, bounds[2] // interval + 1)
    paired = inner.float().prod(3).sum(-1)[0]
    d_leaving = d_leaving if dtype == torch.float16 else d_leaving.to(dtype).float()
    known = [*(paired[:, place] for place in places), (leaving * d_leaving).sum((-2, -1))[0]]
    (reads_q, pairs_q), (reads_k, pairs_k) = (sums.sum(0)[:, 0] for sums in (q_sums, k_sums))
    for number, ((first, last), (start, end)) in enumerate(zip(pairwise(bounds), pairwise(known), strict=True)):
        chunks = [slice(at, min(at + C, last)) for at in range(first, last, C)]
        cut = {forgotten} if number == 0 else set()
        cut |= ({0} if number == 0 else {len(chunks) - 1} if number == 2 else set()) if from_zero else set()
        expected = torch.zeros(2, H_v, last - first)  # tied, and not
        q, k = (torch.stack([reads[:, part].sum(1) for part in chunks], 1).cpu() for reads in (reads_q, reads_k))
        for c, part in enumerate(chunks):
            # The span of chunks around this one that lets states pass, and what is known on both of its sides.
            left = max([other + 1 for other in cut if other < c], default=0)
            right = min([other for other in cut if other > c], default=len(chunks))
            after = q[:, right] if right < len(chunks) else end.cpu()
            before = k[:, left - 1] if left > 0 else start.cpu()
            drift = (after + (q - k)[:, left:right].sum(1) - before) / (right - left)
            walk = after + (q - k)[:, c + 1 : right].sum(1) - k[:, c]
            half = 0.0 if number == 2 and right == len(chunks) else 0.5  # at the run's end by what is known before
            across = torch.stack([walk - drift * (right - c - half), walk]) * (c not in cut)
            reads = reads_q[:, part].flip(1).cumsum(1).flip(1) + reads_k[:, part].cumsum(1) - reads_k[:, part]
            within = (pairs_q - pairs_k)[:, part].flip(1).cumsum(1).flip(1)
            within[:, 0] = 0.0
            if number == 0 and c == forgotten:
                within = formed[0, part].T
            expected[..., part.start - first : part.stop - first] = across[..., None] + (reads + within).cpu()
        got = dg[0, first:last].T.cpu()
        assert relative_error(got, expected[0]) < 1e-5
        assert relative_error(expected[1], expected[0]) > 0.02  # the control: it made a difference


def test_gradient_of_a_gate_laid_out_otherwise(device: torch.device) -> None:
    p = problem("scalar", Dims(T=70), device, torch.float32)
    g = p.x.g.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not g.is_contiguous()
    check(run(fused, p._replace(x=p.x._replace(g=g))), solution(p), BOUNDS[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_sees_a_dropped_state(kind: str, device: torch.device) -> None:
    p = problem(kind, Dims(T=70), device, torch.float32, strongest=1e-3)
    values = run(fused, p._replace(state_in=torch.zeros_like(p.state_in)))
    with pytest.raises(AssertionError):
        check({"o": values["o"]}, {"o": solution(p)["o"]}, 100 * BOUNDS[torch.float32])


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_the_check_sees_gates_shifted_by_a_token(kind: str, device: torch.device) -> None:
    p = problem(kind, Dims(T=70), device, torch.float32, strongest=0.1)
    shifted = run(fused, p._replace(x=p.x._replace(g=p.x.g.detach().roll(1, 1).requires_grad_())))
    references = solution(p)
    for name in ("o", "dq", "dk", "dv", "dg"):
        assert relative_error(shifted[name], references[name]) > 100 * BOUNDS[torch.float32], name


def test_what_the_kernels_do_not_take() -> None:
    p = problem("none", Dims(T=3), torch.device("cpu"), torch.float32)
    wide = p.x._replace(q=torch.zeros(1, 3, 1, 300), k=torch.zeros(1, 3, 1, 300))
    for x in (wide, p.x._replace(q=p.x.q.double())):
        with pytest.raises(ValueError, match="backend='torch'"):
            fused.prepare(x, False)


@pytest.mark.parametrize("bounded", [True, False])
def test_one_middle_and_base_blocks(bounded: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate per channel takes a chunk or blocks of 16 tokens at once in bf16: here in fp32, whose bound is tighter."""
    original = runs.launches_of.__wrapped__

    def made(*arguments: Any) -> runs.Launches:
        found = original(*arguments)
        found.bounded = bounded  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(channel, "base_levels", lambda dtype: channel.BASE_LEVELS)
    monkeypatch.setattr(runs, "launches_of", made)
    p = problem("channel", Dims(T=70), device, torch.float32, strongest=2.0)
    check(run(fused, p), solution(p), BOUNDS[torch.float32])


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # what the interpreter's NumPy says of a unbounded chunk's overflow
def test_bounded_and_unbounded_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a gate per channel: those whose tokens all meet in the middle, and one whose gates are too strong for
    that, which goes by blocks of 16 tokens and by levels. Here in fp32, whose bound is tighter."""
    monkeypatch.setattr(channel, "base_levels", lambda dtype: channel.BASE_LEVELS)
    monkeypatch.setattr(runs, "launches_of", runs.launches_of.__wrapped__)
    p = problem("channel", Dims(T=70), device, torch.float32, strongest=2.0)
    g = p.x.g.detach().clone()
    g[:, 32:64] = -4.5 - g[:, 32:64].abs()
    p = p._replace(x=p.x._replace(g=g.requires_grad_()))
    run_of_x = fused.prepare(p.x, False)
    unbounded = channel_stages.local_outputs(run_of_x, run_of_x.launches).unbounded  # type: ignore[arg-type]
    assert (unbounded.cpu() == torch.tensor([0, 1, 0])).all()
    values, references = run(fused, p), solution(p)
    # Of its strong gates little is left.
    dg = relative_error(values.pop("dg"), references.pop("dg"))
    check(values, references, 2 * BOUNDS[torch.float32])
    assert dg <= 2e-5
    # The control: a unbounded chunk left as it is.
    monkeypatch.setattr(channel.ChannelLaunches, "prepare", lambda self, **tensors: None)
    assert not relative_error(run(fused, p)["o"], references["o"]) <= 1e-3


@pytest.mark.ci
@pytest.mark.parametrize("rows", [False, True])
def test_gates_per_token_gather_little_rounding_over_an_interval(
    rows: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates that forget within a few chunks, by both kinds of sweeps: what one rounds of a token with its decay, the
    other rounds alike. What remains is a walk tied at both ends."""
    p = problem("scalar", Dims(T=2048, H_v=4, K=32, V=32), device, torch.bfloat16)
    g = torch.full_like(p.x.g, -0.09).requires_grad_()  # just too weak for a chunk to forget (launches.FORGETS)

    def one_segment(*arguments: object) -> plans.LaunchPlan:
        found = plans.plan(*arguments[:-1], False)  # not gathered
        assert found.rows and INTERVALS[torch.bfloat16][0] < found.chunks
        keys = found.scalar_keys if rows else plans.Tiles(64, 4, 2)
        return found._replace(segment_chunks=found.chunks, segments=1, rows=rows, scalar_keys=keys)

    monkeypatch.setattr(runs, "plan", one_segment)
    monkeypatch.setattr(runs, "launches_of", runs.launches_of.__wrapped__)
    q, k, v = (tensor.double() for tensor in (p.x.q, p.x.k, p.x.v))
    exact_g = g.detach().double().requires_grad_()
    o, _ = linear_attention(q, k, v, exact_g, backend="torch")
    (expected,) = torch.autograd.grad(o, exact_g, p.d_o.double())

    def error() -> float:
        o, _ = linear_attention(p.x.q, p.x.k, p.x.v, g, backend="triton")
        return relative_error(torch.autograd.grad(o, g, p.d_o)[0], expected)

    found = error()
    assert found < 6e-3
    if rows and device.type == "cpu":  # the control, what the states take rounded otherwise: not patched if compiled
        original = sweep.add_chunk
        monkeypatch.setattr(rows_module, "add_chunk", lambda *args: original(*args[:7], not args[7], args[8]))
        assert error() > 1.2 * found


def test_strong_gates_hide_a_large_gradient_of_the_final_state(device: torch.device) -> None:
    """The state that leaves the last chunk adds much to the gradient of its last gates, none a few tokens before."""
    p = problem("channel", Dims(T=128, H_v=1, K=64, V=64), device, torch.bfloat16, strongest=20.0)
    found, expected = run(fused, p)["dg"], solution(p)["dg"]
    assert relative_error(found, expected) < 8e-3
    # The control: the check sees such a rounding carried through that chunk.
    found[:, 64:] += 2**-8 * found[:, 64:].abs().amax(1, keepdim=True)
    assert relative_error(found, expected) > 8e-3


@pytest.mark.ci
def test_gates_per_channel_gather_little_rounding_over_a_segment(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest segment there is, of gates that forget within a few chunks: a small rest of large sums, which are cut
    at no chunk (launches.FORGETS)."""
    p = problem("channel", Dims(T=2048, H_v=1, K=64, V=64), device, torch.bfloat16)
    p = p._replace(
        x=p.x._replace(g=torch.full_like(p.x.g, -0.07).requires_grad_()), state_in=torch.zeros_like(p.state_in)
    )

    def one_segment(*arguments: object) -> plans.LaunchPlan:
        found = plans.plan(*arguments)
        return found._replace(segment_chunks=found.chunks, segments=1)

    monkeypatch.setattr(runs, "plan", one_segment)
    monkeypatch.setattr(runs, "launches_of", runs.launches_of.__wrapped__)
    assert fused.prepare(p.x, False).launches.plan.chunks == plans.LONGEST_CHANNELS
    expected = solution(p)["dg"]
    assert relative_error(run(fused, p)["dg"], expected) < 8e-3
    if device.type == "cpu":  # the control, one long interval that is not tied: a compiled kernel is not patched
        monkeypatch.setitem(INTERVALS, torch.bfloat16, (32, 32))
        monkeypatch.setattr(channel_through, "_tie", lambda *arguments: None)
        assert relative_error(run(fused, p)["dg"], expected) > 1e-2
