"""The decay family: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t."""

from lasp.kernels.triton.decay.stages import (
    GROUPED_HEADS,
    gradients,
    local_gradients,
    local_outputs,
    outputs,
    summarize,
    summarize_adjoint,
)

__all__ = [
    "GROUPED_HEADS",
    "gradients",
    "local_gradients",
    "local_outputs",
    "outputs",
    "summarize",
    "summarize_adjoint",
]
