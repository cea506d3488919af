"""The operator on one device: chunked against token by token, in fp64 and fp32, and its laws."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import GATES, make, solve
from tolerances import BOUNDS, relative_error, worst

import lasp


@given(
    gate=st.sampled_from(GATES),
    batch=st.integers(1, 3),
    tokens=st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(120, 150)),
    heads=st.sampled_from([(1, 1), (2, 2), (1, 3), (2, 4)]),
    keys=st.integers(1, 9),
    values=st.integers(1, 9),
    slow=st.sampled_from([0.0, 1e-3, 0.1, 30.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_chunks_equal_tokens(gate, batch, tokens, heads, keys, values, slow, seed):
    problem = make(
        gate, batch=batch, tokens=tokens, heads=heads[0], value_heads=heads[1], keys=keys, values=values,
        slow=slow, seed=seed,
    )  # fmt: skip
    values, references = solve(problem, "torch"), solve(problem, "reference")
    if gate == "constant":  # one number a head: relative to what is summed over batch and tokens, which may cancel
        each = problem.inputs["g"].expand(batch, tokens, -1)
        terms = solve(replace(problem, inputs=problem.inputs | {"g": each}), "reference")["d_g"]
        off = (values.pop("d_g") - references.pop("d_g")).abs()
        assert (off <= BOUNDS[torch.float64] * terms.abs().sum((0, 1))).all()
    name, error = worst(values, references)
    assert error < BOUNDS[torch.float64], name


@pytest.mark.parametrize("gate", GATES)
def test_fp32_against_fp64(gate):
    """Within 2e-6 over thousands of tokens that hardly decay, the hard case for rounding."""
    problem = make(gate, tokens=2048, keys=16, values=16, slow=1e-3)
    name, error = worst(solve(problem, "torch", torch.float32), solve(problem, "torch"))
    assert error < BOUNDS[torch.float32], name


def test_reference_is_the_definition():
    """The token loop against the sum it stands for, o_t = scale sum_{s<=t} exp(g_{s+1} + .. + g_t) (q_t k_s) v_s."""
    problem = make("channel", tokens=9)
    q, k, v, g = (problem.inputs[name] for name in "qkvg")
    total = g.cumsum(1)
    expected = torch.zeros_like(v)
    for t in range(9):
        for s in range(t + 1):
            weight = (q[:, t] * k[:, s] * (total[:, t] - total[:, s]).exp()).sum(-1)
            expected[:, t] += 5**-0.5 * weight[..., None] * v[:, s]
    o, _ = lasp.linear_attention(q, k, v, g, backend="reference")
    assert relative_error(o, expected) < 1e-14


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(backend, gate):
    problem = make(gate, batch=1, tokens=5, heads=1, value_heads=2, keys=2, values=2, slow=0.3)
    inputs = {name: t.requires_grad_() for name, t in problem.inputs.items() if t is not None}

    def function(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        q, k, v, state = (named.pop(name) for name in ("q", "k", "v", "initial_state"))
        return lasp.linear_attention(
            q, k, v, named.get("g"), initial_state=state, output_final_state=True, backend=backend
        )

    torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("backend", "start", "poison"), [("torch", 64, torch.nan), ("torch", 70, 1e100)])
def test_future_is_not_seen(gate, backend, start, poison):
    """Whatever the future holds, outputs and gradients before it keep their bits.

    NaN from the next chunk on. Inside a chunk a masked score times NaN is NaN in any matrix product, so there the
    future is a number that would swamp everything.
    """
    inputs = make(gate, tokens=100).inputs

    def run(future):
        leaves = {name: inputs[name].clone() for name in "qkvg" if inputs[name] is not None}
        if future is not None:
            for name in "kv" if future != future else "qkv":
                leaves[name][:, start:] = future
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        o, _ = lasp.linear_attention(*(leaves.get(name) for name in "qkvg"), backend=backend)
        (d_q,) = torch.autograd.grad(o[:, :start].sum(), leaves["q"])
        return o[:, :start], d_q[:, :start]

    for clean, poisoned in zip(run(None), run(poison), strict=True):
        assert torch.equal(clean, poisoned)
    assert not torch.equal(run(None)[0], run(None)[0].flip(1)), "the control: the comparison can fail"


@pytest.mark.parametrize("keys", [4])
def test_unmasked(keys):
    """causal=False against q (k^T v), with gradients by autograd."""
    problem = make("none", keys=keys, causal=False)
    got = solve(problem, "torch")
    q, k, v, state = (problem.inputs[n].detach().clone().requires_grad_() for n in ("q", "k", "v", "initial_state"))
    total = state + torch.einsum("bthk,bthv->bhkv", k, v)
    o = keys**-0.5 * torch.einsum("bthk,bhkv->bthv", q, total)
    torch.autograd.backward((o, total), (problem.d_o, problem.d_final))
    expected = {
        "o": o,
        "final_state": total,
        "d_q": q.grad,
        "d_k": k.grad,
        "d_v": v.grad,
        "d_initial_state": state.grad,
    }
    assert worst(got, expected)[1] < BOUNDS[torch.float64]


@pytest.mark.parametrize("causal", [True, False])
def test_classical_denominator(causal):
    """normalized_linear_attention against the quadratic form, weights divided by their sum."""
    problem = make("none", tokens=70)
    q, k, v = (problem.inputs[name] for name in "qkv")
    q, k = q.exp(), k.exp()
    weights = 5**-0.5 * torch.einsum("bthk,bshk->bhts", q, k)
    weights = weights.tril() if causal else weights
    expected = torch.einsum("bhts,bshv->bthv", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    o, state = lasp.normalized_linear_attention(q, k, v, causal=causal, output_final_state=True)
    assert relative_error(o, expected) < 1e-13
    assert state.shape == (2, 2, 5, 4)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.bfloat16), ("torch", torch.float16), ("reference", torch.float16), ("triton", torch.bfloat16)],
)
def test_only_the_quotient_is_rounded(backend, dtype):
    """Outputs and gradients of 16-bit inputs lose no more than their own rounding, where sums leave fp16's range."""
    q, k, v = (make("none", batch=1, tokens=70, keys=16, values=16).inputs[name] for name in "qkv")
    inputs = [t.to(dtype) for t in ((3 + q).exp(), (3 + k).exp(), v)]
    d_o = make("none", batch=1, tokens=70, values=16, seed=1).d_o.to(dtype)

    def solve_in(dtype, function):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        o = function(*leaves)
        return [o, *torch.autograd.grad(o, leaves, d_o.to(dtype))]

    def divided_after(q, k, v):
        o, _ = lasp.linear_attention(q, k, torch.nn.functional.pad(v, (0, 1), value=1.0), backend="torch")
        return o[..., :-1] / (o[..., -1:] + 1e-6)

    def loss_of(values, references):
        """The most that is lost, in roundings of the exact values."""
        return max(
            relative_error(a, b) / relative_error(b.to(dtype), b) for a, b in zip(values, references, strict=True)
        )

    exact = solve_in(torch.float64, lambda *t: lasp.normalized_linear_attention(*t, backend="torch")[0])
    got = solve_in(dtype, lambda *t: lasp.normalized_linear_attention(*t, backend=backend)[0])
    assert got[0].dtype == dtype and loss_of(got, exact) < 1.2
    assert loss_of(solve_in(dtype, divided_after), exact) > 1.2, "the control: rounded before it divides"


@pytest.mark.parametrize("gate", GATES)
def test_state_continues_a_sequence(gate):
    """A sequence cut anywhere, the final state handed on, gives the whole; without the state it does not."""
    problem = make(gate, tokens=90)
    tensors = [problem.inputs[name] for name in "qkvg"]
    whole, _ = lasp.linear_attention(*tensors)

    def part(piece, state):
        cut = [t if t is None or t.dim() == 1 else t[:, piece] for t in tensors]
        return lasp.linear_attention(*cut, initial_state=state, output_final_state=True)

    for cut in (1, 33, 64, 89):
        first, state = part(slice(0, cut), None)
        second, _ = part(slice(cut, None), state)
        assert relative_error(torch.cat([first, second], 1), whole) < 1e-13
        forgetful, _ = part(slice(cut, None), None)
        assert relative_error(forgetful, whole[:, cut:]) > 1e-3


def test_extreme_decays():
    """A decay of exactly zero, one that underflows, and none, side by side: no NaN, and the reference's values."""
    problem = make("scalar", tokens=130, slow=0.0)
    g = problem.inputs["g"]
    g[:, 3::7] = -torch.inf
    g[:, 5::11] = -2000.0
    g[:, 6::13] = -20.0
    got, expected = solve(problem, "torch"), solve(problem, "reference")
    # exp(-inf) has a zero derivative, which the reference's autograd cannot form as 0 * inf.
    for values in (got, expected):
        values["d_g"] = values["d_g"].masked_fill(g == -torch.inf, 0.0)
    name, error = worst(got, expected)
    assert error < BOUNDS[torch.float64], name


def test_strided_inputs_are_left_alone():
    """Expanded, transposed and reversed views give what their contiguous copies give, and are not written to."""
    base = torch.randn(2, 3, 70, 4, dtype=torch.float64)
    q, k = base.transpose(1, 2), base.transpose(1, 2).flip(1)
    v = torch.randn(1, 70, 1, 6, dtype=torch.float64).expand(2, -1, 3, -1)
    before = base.clone()
    o, _ = lasp.linear_attention(q, k, v)
    expected, _ = lasp.linear_attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(o, expected) and torch.equal(base, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """16-bit inputs keep an fp32 state: only the output's rounding is lost, even over 4096 undecayed tokens."""
    problem = make("constant", tokens=4096, keys=16, values=16, slow=1e-3)
    rounded = {n: t if t is None or n in ("g", "initial_state") else t.to(dtype) for n, t in problem.inputs.items()}
    o, final = lasp.linear_attention(
        rounded["q"], rounded["k"], rounded["v"], rounded["g"], initial_state=rounded["initial_state"].float(),
        output_final_state=True,
    )  # fmt: skip
    exact, _ = lasp.linear_attention(
        *(rounded[n].double() for n in "qkvg"), initial_state=rounded["initial_state"].double()
    )
    assert o.dtype == dtype and final.dtype == torch.float32
    assert relative_error(o, exact) < 5e-3


def test_autocast_does_not_reach_the_state():
    """Under autocast, 16-bit inputs give the bits they give without it: the state stays fp32 inside."""
    problem = make("scalar", tokens=130)
    q, k, v = (problem.inputs[name].bfloat16() for name in "qkv")
    g = problem.inputs["g"].float()

    def run(autocast):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, g)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            o, final = lasp.linear_attention(*leaves, output_final_state=True)
            o.float().square().sum().backward()
        return [o, final, *(leaf.grad for leaf in leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        product = q.float()[0, 0] @ k.float()[0, 0].mT
    assert product.dtype == torch.bfloat16, "the control: autocast does round matrix products"


def test_compiled_gradients_are_the_eager_ones():
    """Some versions of the compiler trace an autograd function and lose what it gives: there the graph must break."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 8, requires_grad=True) for _ in range(3))
    g = (-torch.rand(1, 70, 2)).requires_grad_()

    def loss(*tensors):
        return lasp.linear_attention(*tensors)[0].square().sum()

    torch._dynamo.reset()
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(q, k, v, g), (q, k, v, g))
    for name, value, expected in zip(
        "qkvg", compiled, torch.autograd.grad(loss(q, k, v, g), (q, k, v, g)), strict=True
    ):
        assert (value - expected).norm() <= 1e-6 * expected.norm() > 0, name


def test_packed_documents_are_part_of_a_whole_graph():
    """Given as numbers, of PyTorch's backend: no break, no warning, and as many graphs as documents that differ."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 8, requires_grad=True) for _ in range(3))

    def loss(ends, *tensors):
        return lasp.linear_attention(*tensors, cu_seqlens=ends)[0].square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo detected")
        for ends in ((0, 5, 20), [0, 1, 1, 20], (0, 20)):
            values = torch.autograd.grad(compiled(ends, q, k, v), (q, k, v))
            expected = torch.autograd.grad(loss(ends, q, k, v), (q, k, v))
            for value, each in zip(values, expected, strict=True):
                assert (value - each).norm() <= 1e-6 * each.norm()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="packed documents without fused kernels"):
        compiled(torch.tensor([0, 5, 20]), q, k, v)
