"""Defines every operator, in fp64 and differentiable: loops over tokens, on nothing of the library's.

Tensors are [B, T, H, D], all of the value's heads; gates [B, T, H] or [B, T, H, K]; states [B, H, K, V]. Long decays
are written in chunks, which a test compares with the loop. Each function takes one document and gives its outputs and
the state that leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Tokens up to which a decay is a loop, and of a chunk beyond.
LOOP, CHUNK = 300, 32
# As many tokens as the fused kernels of the delta rule have in a chunk.
DELTA_CHUNK = 64
# Tokens after which a loop's steps are recomputed for its gradients rather than kept.
BLOCK = 128
NORM_EPS = 1e-6

Step = Callable[..., tuple[Tensor, Tensor]]
Rounding = Callable[[Tensor], Tensor]


def decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t."""
    if q.shape[1] <= LOOP:
        return decay_loop(q, k, v, g, state, scale)
    return decay_chunks(q, k, v, g, state, scale)


def decay_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _blocks(partial(_decay_steps, scale), BLOCK, state, q, k, v, g)


def decay_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Tokens of a chunk see each other through every pair's decay, and the chunks before in the state."""
    return _blocks(partial(_decay_chunk, scale), CHUNK, state, q, k, v, g)


def unmasked(q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """S = initial + the sum of all k_t v_t^T, o_t = scale q_t S."""
    state = state + torch.einsum("bthk,bthv->bhkv", k, v)
    return scale * torch.einsum("bthk,bhkv->bthv", q, state), state


def delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale q_t S_t."""
    return _blocks(partial(_delta_steps, scale), BLOCK, state, q, k, v, g, beta)


def delta_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float, rounded: Rounding
) -> tuple[Tensor, Tensor]:
    """`delta` in chunks, with the operands of products `rounded`."""
    return _blocks(partial(_delta_chunk, scale, rounded), DELTA_CHUNK, state, q, k, v, g, beta)


def unit(x: Tensor, through_denominators: bool) -> Tensor:
    """x with length 1."""
    length = (x.square().sum(-1, keepdim=True) + NORM_EPS).sqrt()
    return x / (length if through_denominators else length.detach())


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight[W - 1 - j] x_{t - j}; x [B, T, C], state [B, C, W - 1], the rows before."""
    width, tokens = weight.shape[1] - 1, x.shape[1]
    rows = torch.cat([state.transpose(1, 2), x], 1)
    y = sum((rows[:, width - j : width - j + tokens] * weight[:, width - j] for j in range(width + 1)), x.new_zeros(()))
    y = y if bias is None else y + bias
    return y * y.sigmoid() if activation == "silu" else y, rows[:, tokens:].transpose(1, 2)


def softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    through_denominators: bool = True,
) -> tuple[Tensor, Tensor]:
    """state [B, P, H_kv, D + D_v]: keys beside values of earlier tokens, which all see, or those within the window."""
    kept = torch.cat([state, torch.cat([k, v], -1)], 1)
    keys, values = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in kept.split([k.shape[3], v.shape[3]], -1))
    scores = scale * torch.einsum("bthd,bshd->bhts", q, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        tokens, before = q.shape[1], state.shape[1]
        every = torch.ones(tokens, before + tokens, dtype=torch.bool, device=q.device)
        hidden = every.triu(before + 1)
        if window is not None:
            hidden |= every.tril(before - window)
        scores = scores.masked_fill(hidden, -torch.inf)
    sums = scores.logsumexp(-1, keepdim=True)
    weights = (scores - (sums if through_denominators else sums.detach())).exp()
    return torch.einsum("bhts,bshd->bthd", weights, values), kept


def packed(
    bounds: tuple[int, ...] | None, function: Callable[..., tuple[Tensor, Tensor]], states: list[Tensor], *x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """`function(state, *x)` of every document: x are cut along their tokens. None for a batch of whole sequences."""
    if bounds is None:
        o, final = function(states[0], *x)
        return o, [final]
    lengths = [end - start for start, end in pairwise(bounds)]
    outputs, finals = [], []
    for state, *part in zip(states, *(t.split(lengths, 1) for t in x), strict=True):
        o, final = function(state, *part)
        outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, 1), finals


def _decay_steps(scale: float, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> tuple:
    outputs = []
    for q_t, k_t, v_t, decay_t in zip(*_tokens(q, k, v), _decays(g, q), strict=True):
        state = state if decay_t is None else decay_t * state
        state = state + k_t[..., :, None] * v_t[..., None, :]
        outputs.append((q_t[..., None, :] @ state)[..., 0, :])
    return scale * torch.stack(outputs, 1), state


def _delta_steps(scale: float, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor) -> tuple:
    outputs = []
    for q_t, k_t, v_t, beta_t, decay_t in zip(*_tokens(q, k, v, beta[..., None]), _decays(g, q), strict=True):
        state = state if decay_t is None else decay_t * state
        missing = beta_t * (v_t - (k_t[..., None, :] @ state)[..., 0, :])
        state = state + k_t[..., :, None] * missing[..., None, :]
        outputs.append((q_t[..., None, :] @ state)[..., 0, :])
    return scale * torch.stack(outputs, 1), state


def _decay_chunk(scale: float, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> tuple:
    meet, from_start, to_end, kept = _chunk_decays(q, g)
    o = torch.einsum("bhij,bjhv->bihv", meet(q, k), v) + torch.einsum("bihk,bhkv->bihv", q * from_start, state)
    return scale * o, kept * state + torch.einsum("bjhk,bjhv->bhkv", k * to_end, v)


def _delta_chunk(
    scale: float, rounded: Rounding, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor
) -> tuple:
    meet, from_start, to_end, kept = _chunk_decays(q, g)
    met = beta.movedim(1, 2)[..., None] * rounded(meet(rounded(k), rounded(k))).tril(-1)
    one = torch.eye(q.shape[1], dtype=q.dtype, device=q.device).expand_as(met)
    inverse = rounded(torch.linalg.solve_triangular(met + one, one, upper=False, unitriangular=True))
    entering = rounded(state)
    weight = beta[..., None]
    erases = rounded(torch.einsum("bhij,bjhk->bihk", inverse, rounded(weight * k * from_start)))
    writes = rounded(torch.einsum("bhij,bjhv->bihv", inverse, rounded(weight * v)))
    writes = rounded(writes - rounded(torch.einsum("bihk,bhkv->bihv", erases, entering)))
    o = rounded(torch.einsum("bhij,bjhv->bihv", rounded(meet(rounded(q), rounded(k))), writes))
    o = o + rounded(torch.einsum("bihk,bhkv->bihv", rounded(q * from_start), entering))
    return scale * o, kept * state + rounded(torch.einsum("bjhk,bjhv->bhkv", rounded(k * to_end), writes))


def _chunk_decays(q: Tensor, g: Tensor | None) -> tuple[Callable[[Tensor, Tensor], Tensor], Any, Any, Any]:
    """Scores of a chunk's tokens with earlier ones, with what decays between; decays from its start to every token, of
    that to its end, and of the chunk."""
    size = q.shape[1]
    past = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if g is None:
        return lambda a, b: torch.einsum("bihk,bjhk->bhij", a, b).masked_fill(~past, 0.0), 1.0, 1.0, 1.0
    g = g if g.dim() == 4 else g[..., None]
    # Sums only: of differences little is left, in the gradient of gates that forget all at every token.
    earlier = past.tril(-1)[:, :, None, None]
    between = torch.where(earlier, g[:, :, None], 0.0).cumsum(1)  # [B, i, j, H, 1 or K]
    pairs = torch.where(past[:, :, None, None], between.exp(), 0.0)
    later = torch.cat([g[:, 1:], torch.zeros_like(g[:, :1])], 1).flip(1).cumsum(1).flip(1)

    def meet(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, :, None] * b[:, None] * pairs).sum(-1).movedim(3, 1)

    return meet, g.cumsum(1).exp(), later.exp(), g.sum(1).exp()[..., None]


def _tokens(*x: Tensor) -> list[tuple[Tensor, ...]]:
    """Tokens of each tensor. Slices would be as many tensors of its size, backward."""
    return [t.unbind(1) for t in x]


def _decays(g: Tensor | None, q: Tensor) -> Sequence[Tensor | None]:
    """Decay of each token, as a factor of states [B, H, K, V]."""
    if g is None:
        return [None] * q.shape[1]
    decays = g.exp()
    return (decays[..., None, None] if g.dim() == 3 else decays[..., None]).unbind(1)


def _blocks(step: Step, size: int, state: Tensor, *x: Tensor | None) -> tuple[Tensor, Tensor]:
    """`step(state, *x)` over parts of the tokens."""
    v = x[2]
    assert v is not None
    outputs, tokens = [v[:, :0]], v.shape[1]
    parts = [[None] * -(-tokens // size) if t is None else t.split(size, 1) for t in x]
    for part in zip(*parts, strict=True) if tokens else ():
        if tokens > 2 * size:
            o, state = checkpoint(step, state, *part, use_reentrant=False)
        else:
            o, state = step(state, *part)
        outputs.append(o)
    return torch.cat(outputs, 1), state
