"""Token by token: the definitions."""

from collections.abc import Mapping

from lasp.kernels.reference.token_loop import TokenLoop
from lasp.kernels.reference.tokens import decay_token, delta_token
from lasp.kernels.torch import unmasked
from lasp.recurrence.stages import AnyStages

STAGES: Mapping[str, AnyStages] = {
    "decay": TokenLoop(decay_token).stages(),
    "delta": TokenLoop(delta_token).stages(),
    "unmasked": unmasked.STAGES,
}
