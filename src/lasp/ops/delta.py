"""The delta rule: DeltaNet, Gated DeltaNet, KDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lasp.kernels.select import select
from lasp.ops.call import called, check_initial, initial_of, packed, scale_of, ungrouped
from lasp.ops.checks import check_beta, check_gate, check_gate_values, check_inputs
from lasp.ops.scan import ScanPlan, scan, untraced
from lasp.recurrence.decay import state_dtype
from lasp.recurrence.delta import DeltaInputs
from lasp.recurrence.stages import Stages
from lasp.sequence import SequenceParallel
from lasp.sequence.arguments import check_flags
from lasp.sequence.validation import broadcast_errors, check_shard

# Added to the squared length of queries and keys, so that a zero vector stays zero.
NORM_EPS = 1e-6


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    sp: SequenceParallel | None = None,
    backend: str = "auto",
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with any decay: each token replaces what its key reads by its value, to the degree beta.

        S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,    o_t = scale q_t S_t

    The gate's rank names the recurrence: None (DeltaNet, arXiv 2406.06484), [B, T, H_v] (Gated DeltaNet, arXiv
    2412.06464), [B, T, H_v, K] (Kimi Delta Attention, arXiv 2510.26692). Keys must have length 1 (`normalize_qk`):
    longer ones let the state grow without bound wherever beta |k|^2 > 2. With `sp`, T is this rank's part of a
    longer sequence, and the result is as if one device had computed all of it.

    Args:
        q, k: [B, T, H, K], fp64, fp32, bf16 or fp16.
        v: [B, T, H_v, V] of the same dtype; H_v a multiple of H. Value head h uses query head h // (H_v // H).
        beta: [B, T, H_v], any floating dtype, in [0, 2]: 0 leaves the state alone, 1 replaces what the key reads,
            2 reflects (negative eigenvalues).
        g: natural logarithm of the decay, <= 0, any floating dtype; it is used in the state's.
        normalize_qk: divide q and k by their lengths first, in the state's dtype: sqrt(sum of squares + 1e-6).
        scale, initial_state, output_final_state, cu_seqlens, sp: as in `linear_attention`.
        backend: "auto", "torch" (chunked, any device), "fla" (flash-linear-attention's kernels, on a GPU, with the
            extra `fla`) or "reference" (token by token, slow, exact).

    Returns:
        o [B, T, H_v, V] in v's dtype, and the final state [B, H_v, K, V] or None.

    Raises:
        ValueError: an argument does not fit.
        ExchangeError: the ranks of `sp` disagree, or one does not answer in time.
    """
    with broadcast_errors(sp):
        check_inputs(q, k, v)
        check_flags(output_final_state=output_final_state, normalize_qk=normalize_qk)
        check_shard(sp, q.shape[1])
        check_beta(beta, v)
        if g is not None:
            check_gate(g, q, v, constant=False)
            check_gate_values(g)
        dtype = state_dtype(q.dtype)
        documents = packed(cu_seqlens, q.shape[0], q.shape[1], sp)
        gate = None if g is None else g.to(dtype)
        x = DeltaInputs(q, k, v, beta.to(dtype), gate, scale_of(q, scale), documents)
        check_initial(x, initial_state)
        stages = select("delta", backend, x)
    return _scanned(stages, x, initial_state, output_final_state, normalize_qk, sp)


# Its gradients take gradients of their own, which the compiler does not follow.
@untraced
def _scanned(
    stages: Stages,
    x: DeltaInputs,
    initial_state: Tensor | None,
    output_final_state: bool,
    normalize_qk: bool,
    sp: SequenceParallel | None,
) -> tuple[Tensor, Tensor | None]:
    """Tell the other ranks, then scan."""
    call = called(sp, "delta_rule", x, initial_state, output_final_state, normalize_qk=normalize_qk)
    if normalize_qk:
        x = x._replace(q=_unit(x.q, x.beta.dtype), k=_unit(x.k, x.beta.dtype))
    initial = initial_of(x, initial_state)
    return scan(ScanPlan(stages, sp, call, False, output_final_state), ungrouped(stages, x), initial)


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype` with length 1. Rounded to 16 bits, a key would be too long or too short by up to 0.4 %."""
    x = x.to(dtype)
    return x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()
