"""Rotary and LRPE: derived again with complex numbers, and relative at any global position."""

import cmath
import math

import pytest
import torch

from lasp.layers import LRPE, Rotary, sinusoids

B, T, H, K = 1, 6, 2, 8
FAR = 2**20 + 3


def random_qk(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, B, T, H, K, dtype=torch.float64, generator=generator).to(dtype)


def scores(encoding, q, k, start):
    with torch.no_grad():
        q, k = encoding(q, k, start)
    return torch.einsum("bthk,bshk->bhts", q.double(), k.double())


def expected_score(encoding, q, k, t, s):
    """sum over channel pairs or channels of Re(...), one complex number at a time, by distance t - s alone."""
    total = torch.zeros(H, dtype=torch.float64)
    for h in range(H):
        if isinstance(encoding, Rotary):
            for i in range(K // 2):
                query = complex(q[0, t, h, i], q[0, t, h, i + K // 2])
                key = complex(k[0, s, h, i], k[0, s, h, i + K // 2])
                turn = cmath.exp(1j * (t - s) * 10000 ** (-2 * i / K))
                total[h] += (query * turn * key.conjugate()).real
        else:
            for i in range(K):
                theta = encoding.theta[h, i].item()
                total[h] += float(q[0, t, h, i] * k[0, s, h, i]) * math.cos((t - s) * theta)
    return total


@pytest.mark.parametrize("encoding", [Rotary(K), LRPE(H, K).double()], ids=["rotary", "lrpe"])
def test_scores_depend_on_distance_alone(encoding):
    q, k = random_qk()
    near, far = scores(encoding, q, k, 0), scores(encoding, q, k, FAR)
    for t in range(T):
        for s in range(T):
            torch.testing.assert_close(near[0, :, t, s], expected_score(encoding, q, k, t, s), rtol=0, atol=1e-12)
    # fp64 angles at 2^20 carry 2^20 * 2^-53 radians of rounding.
    torch.testing.assert_close(far, near, rtol=0, atol=1e-8)
    assert (scores(encoding, q.roll(1, 1), k, 0) - near).abs().max() > 0.1


@pytest.mark.parametrize("encoding", [Rotary(K), LRPE(H, K)], ids=["rotary", "lrpe"])
def test_fp32_is_as_good_far_away_as_near(encoding):
    q, k = random_qk(torch.float32)
    exact = scores(encoding, q, k, 0)
    assert (scores(encoding, q, k, FAR) - exact).abs().max() < 2e-5


def test_lrpe_doubles_the_head_dim_and_keeps_norms():
    lrpe = LRPE(H, K).double()
    q, k = random_qk()
    encoded, _ = lrpe(q, k, FAR)
    assert encoded.shape == (B, T, H, 2 * K) and lrpe.dim_out == 2 * K
    torch.testing.assert_close(encoded.norm(dim=-1), q.norm(dim=-1))
    assert torch.allclose(lrpe.theta, 10000 ** (-2 * torch.arange(H * K).view(H, K) / (H * K)).double())


def test_lrpe_gradients_through_the_recomputation():
    lrpe = LRPE(H, K).double()
    q, k = random_qk()
    q.requires_grad_()
    weights = torch.randn(B, T, H, 2 * K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(theta):
        encoded = lrpe._encode(q, k, theta, 5)
        return (encoded[0] * weights).sum() + (encoded[1] * weights.flip(1)).sum()

    theta = lrpe.theta.detach().clone().requires_grad_()
    expected = torch.autograd.grad(loss(theta), (q, theta))
    encoded = lrpe(q, k, 5)
    actual = torch.autograd.grad((encoded[0] * weights).sum() + (encoded[1] * weights.flip(1)).sum(), (q, lrpe.theta))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert torch.autograd.gradcheck(loss, (theta,))


def test_theta_stays_fp32_in_a_bf16_model():
    lrpe = LRPE(H, K)
    before = lrpe.theta.detach().clone()
    lrpe.bfloat16()
    assert lrpe.theta.dtype == torch.float32 and torch.equal(lrpe.theta, before)
    encoded, _ = lrpe(*random_qk(torch.bfloat16), 0)
    assert encoded.dtype == torch.bfloat16
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert LRPE(H, K).theta.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_sinusoids_at_a_global_position():
    table = sinusoids(torch.arange(FAR, FAR + 2).double(), 4, base=10000.0, dtype=torch.float64)
    angles = [FAR + 1, (FAR + 1) / 100]
    expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
    torch.testing.assert_close(table[1], expected, rtol=0, atol=1e-9)


def test_odd_head_dims_have_no_rotary():
    with pytest.raises(ValueError, match=r"must be even, .*; got 7"):
        Rotary(7)
