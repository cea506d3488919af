"""The decay family: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t."""

from lasp.kernels.triton.decay.operators import fused, start
from lasp.kernels.triton.decay.stages import (
    BAD_GATES_GIVE_NAN,
    GROUPED_HEADS,
    gradients,
    local_gradients,
    local_outputs,
    outputs,
    summarize,
    summarize_adjoint,
)

__all__ = [
    "BAD_GATES_GIVE_NAN",
    "GROUPED_HEADS",
    "fused",
    "gradients",
    "local_gradients",
    "local_outputs",
    "outputs",
    "start",
    "summarize",
    "summarize_adjoint",
]
