"""Token by token: the definitions."""

from lasp.kernels.reference.token_loop import TokenLoop
from lasp.kernels.reference.tokens import decay_token, delta_token
from lasp.kernels.torch import unmasked

decay = TokenLoop(decay_token)
delta = TokenLoop(delta_token)

__all__ = ["decay", "delta", "unmasked"]
