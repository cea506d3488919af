"""Position encodings, all by global position: that of a token in the whole sequence, not in a shard or a chunk.

Angles are position * frequency in fp64 and only then rounded: at position 2^20 an fp32 angle is off by up to 0.06
radians and a bf16 position by 4096 tokens. What a query and a key then score depends on their distance alone.

T = tokens here, H = heads, K = head dim, s = global position of the first token here.
"""

# No postponed annotations: an operator's schema is read from them.
import torch
from torch import Tensor, nn

from lasp.layers.fields import check_counts
from lasp.layers.parameters import ExactParameters, exact_parameter
from lasp.layers.recomputed import recomputed
from lasp.sequence.arguments import FLOATS, check_floats, positive, whole


def global_positions(start: int, length: int, device: torch.device) -> Tensor:
    """Positions start .. start + length - 1 as fp64 [T], exact up to 2^53."""
    return torch.arange(start, start + length, dtype=torch.float64, device=device)


def _rotation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sinusoids(positions: Tensor, dim: int, *, base: float, dtype: torch.dtype) -> Tensor:
    """Encoding [T, dim] of `positions` [T] (fp64) to add to embeddings: sines, then cosines, of s * base^(-2 i / dim).

    Source: Vaswani et al., "Attention is all you need", section 3.5 (there sines and cosines alternate).
    """
    check_floats("positions", positions, "[T]", 1)
    _check_pairs("dim", dim)
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {[str(known) for known in FLOATS]}, got {dtype!r}")
    base = positive("base", base)
    pairs = torch.arange(dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions[:, None] * base ** (-2 * pairs / dim)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(dtype)


def _check_pairs(name: str, dim: int) -> None:
    """Raise ValueError unless `dim` channels make pairs."""
    if whole(name, dim, 1) % 2:
        raise ValueError(f"{name} must be even, because positions turn pairs of channels; got {dim}")


class Rotary(nn.Module):
    """Rotates channel pairs (i, i + K/2) by the angle position * base^(-2 i / K). The head dim stays.

    Source: Su et al., RoFormer; RetNet rotates q and k alike. Which channels pair up is a matter of layout.
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        _check_pairs("head_dim", head_dim)
        self.dim_out = head_dim
        self.head_dim = head_dim
        self.base = positive("base", base)

    def forward(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """q, k [B, T, H, K] whose first token is at global position `start` -> the same shapes and dtypes."""
        table = rotations(start, q.shape[1], self.head_dim, self.base, _rotation_dtype(q.dtype), q.device)
        return _rotate(q, *table), _rotate(k, *table)


@torch.library.custom_op("lasp::rotations", mutates_args=())
def rotations(
    start: int, length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [T, 1, K / 2] of a rotary encoding's angles.

    An operator, so that a compiled graph has them as tensors: fused into what reads them, powers and sines in fp64
    would be taken for every head anew, forward and backward.
    """
    pairs = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    angles = global_positions(start, length, device)[:, None, None] * base ** (-2 * pairs / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@rotations.register_fake
def _(
    start: int, length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    like = torch.empty(length, 1, head_dim // 2, dtype=dtype, device=device)
    return like, torch.empty_like(like)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).to(x.dtype)


class LRPE(ExactParameters):
    """Linearized relative position encoding: x -> [x cos(theta s), x sin(theta s)], which doubles the head dim.

    theta is learned. A query and a key then score sum_i q_i k_i cos(theta_i (s - t)). theta starts at
    base^(-2 j / (H K)), where j counts the channels of all heads, as in TransNormerLLM's released code. Eight bits of
    it would turn a query at position 2^20 by thousands of radians.
    Source: Qin et al., "Linearized relative positional encoding" (2023); TransNormerLLM, section 3.1.1.
    """

    exact = ("theta",)

    def __init__(self, num_heads: int, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        check_counts(num_heads=num_heads, head_dim=head_dim)
        self.dim_out = 2 * head_dim
        self.base = positive("base", base)
        self.theta = exact_parameter(num_heads, head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        channels = torch.arange(self.theta.numel(), dtype=torch.float64, device=self.theta.device)
        with torch.no_grad():
            self.theta.copy_((self.base ** (-2 * channels / self.theta.numel())).view_as(self.theta))

    def forward(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """q, k [B, T, H, K] whose first token is at global position `start` -> [B, T, H, 2K]."""
        # The fp64 angles and their sines are as large as several activations.
        return recomputed(self._encode, q, k, self.theta, start)

    @staticmethod
    def _encode(q: Tensor, k: Tensor, theta: Tensor, start: int) -> tuple[Tensor, Tensor]:
        angles = global_positions(start, q.shape[1], q.device)[:, None, None] * theta.to(torch.float64)
        dtype = _rotation_dtype(q.dtype)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return _expand(q, cos, sin), _expand(k, cos, sin)


def _expand(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((x * cos, x * sin), dim=-1).to(x.dtype)
