"""The delta rule: DeltaNet, Gated DeltaNet, KDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lasp.kernels.select import select
from lasp.ops.autograd import scan
from lasp.ops.checks import (
    check_beta,
    check_beta_values,
    check_erase_key,
    check_gate,
    check_gate_values,
    check_initial,
    check_inputs,
    check_keys,
    check_queries,
    packed,
    read_later,
    scale_of,
)
from lasp.ops.pending import PendingOutputs
from lasp.ops.scan import ScanPlan
from lasp.recurrence.inputs import NORM_EPS, DeltaInputs, state_dtype
from lasp.sequence import SequenceParallel
from lasp.sequence.arguments import check_flags
from lasp.sequence.sequence_parallel import broadcast_errors, check_shard


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
    erase_key: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with any decay: each token replaces what its key reads by its value, to the degree beta.

        S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,    o_t = scale q_t S_t

    The gate's rank names the recurrence: None (DeltaNet, arXiv 2406.06484), [B, T, H_v] (Gated DeltaNet, arXiv
    2412.06464), [B, T, H_v, K] (Kimi Delta Attention, arXiv 2510.26692). Keys must have length 1 (`normalize_qk`):
    longer ones let the state grow without bound wherever beta |k|^2 > 2. With an erase key r of its own a token reads
    with that, S_t = (I - beta_t k_t r_t^T) ..: Gated DeltaNet-2 (arXiv 2605.22791, r = b k, v = w v, beta = 1), Comba
    (arXiv 2506.02475). That is no contraction: gates must pay for what it lets grow. With `sp`, T is this rank's part
    of a longer sequence, and the result is as if one device had computed all of it.

    Args:
        q, k: [B, T, H, K], fp64, fp32, bf16 or fp16.
        v: [B, T, H_v, V] of the same dtype; H_v a multiple of H. Value head h uses query head h // (H_v // H).
        beta: [B, T, H_v], any floating dtype, in [0, 2]: 0 leaves the state alone, 1 replaces what the key reads,
            2 reflects (negative eigenvalues).
        g: natural logarithm of the decay, <= 0, any floating dtype; it is used in the state's.
        normalize_qk: divide q and k by their lengths first, in the state's dtype: sqrt(sum of squares + 1e-6).
        erase_key: r, of k's shape, dtype and device; k if None. Not with normalize_qk, nor by the backend "fla".
        scale, initial_state, output_final_state, cu_seqlens, sp: as in `linear_attention`.
        backend: "auto" ("triton" on a GPU, else "torch"), "triton" (fused kernels, on a GPU; with bf16 inputs products
            are of bf16, states fp32), "torch" (chunked, any device), "fla" (flash-linear-attention's kernels, on a GPU,
            with the extra `fla`) or "reference" (token by token, slow, exact).

    Returns:
        o [B, T, H_v, V] in v's dtype, and the final state [B, H_v, K, V] or None.

    Raises:
        ValueError: an argument does not fit.
        ExchangeError: the ranks of `sp` disagree, or one does not answer in time.
    """
    with broadcast_errors(sp):
        check_inputs(q, k, v)
        plan, x = _planned(
            k, v, beta, g, scale, initial_state, output_final_state, cu_seqlens, sp, backend, normalize_qk, erase_key
        )
    return _finished(plan, x, q, initial_state)


def delta_rule_begin(
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
    erase_key: Tensor | None = None,
) -> PendingOutputs:
    """Start `delta_rule` before its queries are known; see `linear_attention_begin`."""
    with broadcast_errors(sp):
        check_keys(k, v)
        plan, x = _planned(
            k, v, beta, g, scale, initial_state, output_final_state, cu_seqlens, sp, backend, normalize_qk, erase_key
        )

    def finish(q: Tensor) -> tuple[Tensor, Tensor | None]:
        with broadcast_errors(sp):
            check_queries(q, k)
        return _finished(plan, x, q, initial_state)

    return PendingOutputs(finish)


def _planned(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | Sequence[int] | None,
    sp: SequenceParallel | None,
    backend: str,
    normalize_qk: bool,
    erase_key: Tensor | None,
) -> tuple[ScanPlan, DeltaInputs]:
    """Check the arguments. The plan, and the inputs with k in the place of q, which is laid out alike."""
    check_flags(output_final_state=output_final_state, normalize_qk=normalize_qk)
    check_shard(sp, k.shape[1])
    check_beta(beta, v)
    if g is not None:
        check_gate(g, k, v, constant=False)
    dtype = state_dtype(k.dtype)
    gate = None if g is None else g.to(dtype)
    x = DeltaInputs(k, k, v, beta.to(dtype), gate, scale_of(k, scale), None, False, erase_key)
    if erase_key is not None:
        check_erase_key(erase_key, k, normalize_qk)
    stages = select("delta", backend, x)
    bounds = read_later(cu_seqlens, stages)
    documents = packed(cu_seqlens, k.shape[0], k.shape[1], sp) if bounds is None else None
    ranks = sp if sp is not None and sp.size > 1 else None
    if erase_key is not None and not stages.erases:
        raise ValueError(f"backend {backend!r} has no erase_key; use backend='auto'")
    if not (k.is_cuda and stages.bad_values_give_nan):
        check_beta_values(beta)
        if g is not None:
            check_gate_values(g)
    change = _unit_length if normalize_qk and not stages.normalizes else None
    normalize = normalize_qk and stages.normalizes
    # Not by _replace: PyTorch 2.11's compiler fails at a graph break that what it made lives through.
    x = DeltaInputs(k, k, v, x.beta, x.g, x.scale, documents, normalize, erase_key)
    check_initial(x, initial_state, bounds)
    options = {"normalize_qk": normalize_qk, "erase_key": erase_key is not None}
    return ScanPlan("delta_rule", stages, ranks, output_final_state, False, documents, bounds, options, change), x


def _finished(plan: ScanPlan, x: DeltaInputs, q: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    # Not by _replace, as above.
    return scan(
        plan, DeltaInputs(q, x.k, x.v, x.beta, x.g, x.scale, x.documents, x.normalize, x.erase_key), initial_state
    )


def _unit_length(x: DeltaInputs) -> DeltaInputs:
    """x whose queries and keys have length 1, in the state's dtype."""
    return x._replace(q=_unit(x.q, x.beta.dtype), k=_unit(x.k, x.beta.dtype))


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype` with length 1. Rounded to 16 bits, a key would be too long or too short by up to 0.4 %."""
    x = x.to(dtype)
    return x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()
