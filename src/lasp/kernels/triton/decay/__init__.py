"""The decay family: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t."""

from lasp.kernels.triton.decay.operators import linear_attention as on_one_device
from lasp.kernels.triton.decay.stages import BAD_GATES_GIVE_NAN, GROUPED_HEADS, SUMMARY_WITHOUT_QUERIES
from lasp.kernels.triton.decay.traced import (
    COMPILED_CONSTANTS_ARE_FIXED,
    gradients,
    local_gradients,
    local_outputs,
    outputs,
    summarize,
    summarize_adjoint,
)

__all__ = [
    "BAD_GATES_GIVE_NAN",
    "COMPILED_CONSTANTS_ARE_FIXED",
    "GROUPED_HEADS",
    "SUMMARY_WITHOUT_QUERIES",
    "gradients",
    "local_gradients",
    "local_outputs",
    "on_one_device",
    "outputs",
    "summarize",
    "summarize_adjoint",
]
