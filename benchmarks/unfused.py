"""Linear attention with a decay per head, every product a PyTorch kernel of its own: what the ablation calls unfused.

Legend: B batch, H heads, N chunks, C tokens a chunk, K and V head dims.
    b       [B, H, N, C]     log-decay accumulated from the chunk's start, the token's own included
    across  [B, H, N, N]     decay from the end of chunk m to the start of chunk n > m, else zero
    starts  [B, H, N, K, V]  state at the start of each chunk; ends: gradient of the state at its end
Products within a chunk and with states are in the inputs' dtype; decays, states and their scan are fp32. The scan over
chunks is one product with `across`. The stages' contract is that of `lasp.recurrence.stages`, on one device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp.recurrence.inputs import DecayInputs

# Of the authors' kernels.
CHUNK = 256


class Chunks(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor
    across: Tensor


def _cut(tensor: Tensor, size: int) -> Tensor:
    """[B, T, H, ..] -> [B, H, N, C, ..]."""
    return tensor.unflatten(1, (-1, size)).movedim(3, 1)


def _join(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, 3).flatten(1, 2)


def _chunks(x: DecayInputs) -> Chunks:
    assert x.g is not None
    B, T, H, _ = x.q.shape
    size = min(CHUNK, T)
    g = x.g.expand(B, T, H) if x.g.dim() == 1 else x.g
    b = _cut(g.float(), size).cumsum(3)
    ends = b[..., -1].cumsum(2)
    between = (ends - b[..., -1])[..., :, None] - ends[..., None, :]
    past = torch.ones(between.shape[-2:], dtype=torch.bool, device=g.device).tril(-1)
    across = between.masked_fill(~past, -torch.inf).exp()
    q, k, v = (_cut(t, size) for t in (x.q, x.k, x.v))
    return Chunks(q, k, v, b, across)


def _within(c: Chunks) -> Tensor:
    """exp(b_i - b_j) for j <= i, else zero; [B, H, N, C, C]."""
    past = torch.ones(c.b.shape[-1], c.b.shape[-1], dtype=torch.bool, device=c.b.device).tril()
    return (c.b[..., :, None] - c.b[..., None, :]).masked_fill(~past, -torch.inf).exp().to(c.q.dtype)


def _from_start(c: Chunks, tensor: Tensor) -> Tensor:
    return tensor * c.b.exp()[..., None].to(tensor.dtype)


def _to_end(c: Chunks, tensor: Tensor) -> Tensor:
    return tensor * (c.b[..., -1:] - c.b).exp()[..., None].to(tensor.dtype)


def _scan(across: Tensor, states: Tensor) -> Tensor:
    return (across @ states.float().flatten(3)).view(states.shape)


def states(x: DecayInputs) -> Tensor:
    """The state cache: `starts`."""
    c = _chunks(x)
    return _scan(c.across, _to_end(c, c.k).mT @ c.v)


def forward(x: DecayInputs) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and `starts`."""
    c = _chunks(x)
    within = ((c.q @ c.k.mT) * _within(c)) @ c.v
    starts = _scan(c.across, _to_end(c, c.k).mT @ c.v)
    return _join(x.scale * (within + _from_start(c, c.q) @ starts.to(c.q.dtype))), starts


def backward(x: DecayInputs, starts: Tensor, d_o: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, of a gate per token, g."""
    c = _chunks(x)
    d_out = x.scale * _cut(d_o, c.q.shape[3])
    ends = _scan(c.across.mT, _from_start(c, c.q).mT @ d_out).to(c.q.dtype)
    decay = _within(c)
    d_scores = (d_out @ c.v.mT) * decay
    dq = d_scores @ c.k + _from_start(c, d_out @ starts.to(c.q.dtype).mT)
    dk = d_scores.mT @ c.q + _to_end(c, c.v @ ends.mT)
    dv = ((c.q @ c.k.mT) * decay).mT @ d_out + _to_end(c, c.k) @ ends
    gradients = tuple(_join(t) for t in (dq, dk, dv))
    assert x.g is not None
    if x.g.dim() == 1:
        return gradients
    # What passes a token's decay: everything that later tokens read less what they themselves wrote.
    passed = (c.q.float() * dq.float() - c.k.float() * dk.float()).sum(-1)
    return (*gradients, _join(passed).flip(1).cumsum(1).flip(1))
