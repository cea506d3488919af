"""Short convolutions and token shifts: what reads a few tokens back, also across ranks and never across documents."""

from lasp.halo.functions import short_convolution, token_shift

__all__ = ["short_convolution", "token_shift"]
