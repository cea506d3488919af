"""Linear attention with any decay, and its normalised form."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from torch import Tensor
from torch.nn.functional import pad

from lasp.kernels.select import select
from lasp.ops.autograd import begin_early, scan
from lasp.ops.checks import (
    check_gate,
    check_gate_values,
    check_initial,
    check_inputs,
    check_keys,
    check_queries,
    check_weights,
    packed,
    read_later,
    scale_of,
)
from lasp.ops.pending import PendingOutputs
from lasp.ops.scan import ScanPlan
from lasp.recurrence.inputs import DecayInputs, state_dtype
from lasp.sequence import SequenceParallel
from lasp.sequence.arguments import check_flags, number
from lasp.sequence.sequence_parallel import broadcast_errors, check_shard

_CAUSAL, _SEES_ALL = {"causal": True}, {"causal": False}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    log_weight: Tensor | None = None,
    skip: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    causal: bool = True,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    sp: SequenceParallel | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with any decay: S_t = exp(g_t) S_{t-1} + w_t k_t v_t^T, o_t = scale q_t S_t + skip v_t.

    The gate's rank names the recurrence: None (plain linear attention), [H_v] (a constant per head: RetNet,
    Lightning attention, TransNormerLLM), [B, T, H_v] (a gate per head: Mamba-2, simple GLA), [B, T, H_v, K] (a gate
    per key channel: GLA). With `sp`, T is this rank's part of a longer sequence, and the result is as if one device
    had computed all of it (LASP, arXiv 2404.02882).

    Args:
        q, k: [B, T, H, K], fp64, fp32, bf16 or fp16.
        v: [B, T, H_v, V] of the same dtype; H_v a multiple of H. Value head h uses query head h // (H_v // H).
        g: natural logarithm of the decay, <= 0, any floating dtype; it is used in the state's. On a GPU, where looking
            would wait for it, a value that is positive or NaN makes an assertion on the device fail ("torch") or gives
            NaN from its token on ("triton").
        log_weight: [B, T, H_v], natural logarithm of each token's weight w (Mamba-2's steps, mLSTM's input gates), any
            floating dtype; w is 1 if None.
        skip: [H_v], how much of its own value each token's output has beside (Mamba-2's D), any floating dtype; 0 if
            None.
        scale: factor of the outputs, K ** -0.5 by default.
        initial_state: [B, H_v, K, V], the state before the first token of the global sequence, the same on every
            rank of `sp`; fp32, fp64 for fp64 inputs. Its gradient is whole on the group's first rank and zero on
            the others.
        output_final_state: also return the state after the last token of the global sequence, on every rank. The
            gradients that the ranks give for it are summed.
        causal: False for outputs that see all tokens (g must be None).
        cu_seqlens: packed documents: 0, the end of the first, of the second, .. up to the tokens of the whole
            sequence, over all ranks of `sp` (int tensor, best on the CPU, or ints). B must be 1; states are then
            [documents, H_v, K, V]. Documents may cross any number of ranks and may be empty; nothing leaks between.
        sp: the ranks that share the sequence. All of them must call, with the same arguments but for the tokens.
        backend: "torch" (chunked, any device), "triton" (fused kernels on a GPU; bf16, fp16 and fp32) or "reference"
            (token by token, slow, exact); "auto" is "triton" where that runs, else "torch", and logs which
            (`lasp.kernels.select`; a GPU left to PyTorch as a warning).

    Returns:
        o [B, T, H_v, V] in v's dtype, and the final state [B, H_v, K, V] or None.

    Raises:
        ValueError: an argument does not fit.
        ExchangeError: the ranks of `sp` disagree, or one does not answer in time.
    """
    with broadcast_errors(sp):
        check_inputs(q, k, v)
        check_weights(log_weight, skip, v)
        plan, x = _planned(
            q, k, v, g, log_weight, skip, scale, initial_state, output_final_state, causal, cu_seqlens, sp, backend
        )
    return _skipping(scan(plan, x, initial_state), x, v, skip)


def linear_attention_begin(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    log_weight: Tensor | None = None,
    skip: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    causal: bool = True,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    sp: SequenceParallel | None = None,
    backend: str = "auto",
) -> PendingOutputs:
    """Start `linear_attention` before its queries are known, and with fused kernels over ranks its exchange.

    What is computed until `finish(q)` hides the exchange. Arguments are those of `linear_attention`.

    Returns:
        an object whose `finish(q)` gives what `linear_attention` does.

    Raises:
        ValueError: an argument does not fit; also by `finish`.
        ExchangeError: the ranks of `sp` disagree, or one does not answer in time; also by `finish`.
    """
    with broadcast_errors(sp):
        check_keys(k, v)
        check_weights(log_weight, skip, v)
        plan, x = _planned(
            k, k, v, g, log_weight, skip, scale, initial_state, output_final_state, causal, cu_seqlens, sp, backend
        )
    begun = begin_early(plan, x, initial_state)

    def finish(q: Tensor) -> tuple[Tensor, Tensor | None]:
        with broadcast_errors(sp):
            check_queries(q, k)
        # Not by _replace: PyTorch 2.11's compiler fails at a graph break that what it made lives through.
        whole = DecayInputs(q, x.k, x.v, x.g, x.scale, x.documents, x.log_weight, x.skip)
        return _skipping(scan(plan, whole, initial_state, begun), x, v, skip)

    return PendingOutputs(finish)


def _skipping(
    results: tuple[Tensor, Tensor | None], x: DecayInputs, v: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The results with what skips the recurrence, where the stages have not added it."""
    if skip is None or x.skip is not None:
        return results
    o, final = results
    dtype = state_dtype(v.dtype)
    return (o + skip.to(dtype)[:, None] * v.to(dtype)).to(v.dtype), final


def _planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    log_weight: Tensor | None,
    skip: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    causal: bool,
    cu_seqlens: Tensor | Sequence[int] | None,
    sp: SequenceParallel | None,
    backend: str,
) -> tuple[ScanPlan, DecayInputs]:
    """Check the arguments. The plan, and the inputs; k stands for queries yet to come, which are laid out alike."""
    check_flags(causal=causal, output_final_state=output_final_state)
    check_shard(sp, k.shape[1])
    if g is not None:
        if not causal:
            raise ValueError("causal=False has no order in which to decay: g must be None")
        check_gate(g, k, v)
        g = g.to(state_dtype(k.dtype))
    x = DecayInputs(q, k, v, g, scale_of(k, scale))
    stages = select("decay" if causal else "unmasked", backend, x)
    if cu_seqlens is not None and not causal:
        raise ValueError("causal=False sees the whole sequence: cu_seqlens must be None")
    bounds = read_later(cu_seqlens, stages)
    if bounds is None and cu_seqlens is not None:
        follows = stages.traceable and stages.empty_saved is None
        documents = packed(cu_seqlens, k.shape[0], k.shape[1], sp, traceable=follows)
        x = DecayInputs(q, k, v, g, x.scale, documents)
    check_initial(x, initial_state, bounds)
    if log_weight is not None or skip is not None:
        x = _weighed(x, log_weight, skip, stages.weighs is not None and stages.weighs(x))
    if g is not None and not (g.is_cuda and stages.bad_values_give_nan):
        check_gate_values(g)
    ranks = sp if sp is not None and sp.size > 1 else None
    options = _CAUSAL if causal else _SEES_ALL
    return ScanPlan("linear_attention", stages, ranks, output_final_state, not causal, x.documents, bounds, options), x


def _weighed(x: DecayInputs, log_weight: Tensor | None, skip: Tensor | None, taken: bool) -> DecayInputs:
    """x with weights of tokens and skips, where stages take them; else with the values weighed."""
    dtype = state_dtype(x.v.dtype)
    if not taken:
        values = x.v if log_weight is None else (log_weight.to(dtype).exp()[..., None] * x.v).to(x.v.dtype)
        return DecayInputs(x.q, x.k, values, x.g, x.scale, x.documents)
    log_weight = x.v.new_zeros(x.v.shape[:3], dtype=dtype) if log_weight is None else log_weight.to(dtype)
    skip = x.v.new_zeros(x.v.shape[2], dtype=dtype) if skip is None else skip.to(dtype)
    return DecayInputs(x.q, x.k, x.v, x.g, x.scale, x.documents, log_weight, skip)


def normalized_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    eps: float = 1e-6,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    causal: bool = True,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    sp: SequenceParallel | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention divided by its weights' sum, as in the Linear Transformer (arXiv 2006.16236, eq. 9).

    The denominator is the same recurrence on a column of ones beside v, so it crosses ranks like everything else.
    q and k must be non-negative (a positive feature map) for the denominator to be one.

    16-bit inputs are computed in fp32 and only the quotient is rounded: fp16 ends at 65,504, which sums of weights
    reach, and the gradients of numerator and denominator nearly cancel in q's.

    Args:
        eps: added to the denominator, >= 0.
        others: as in `linear_attention`; states are [B, H_v, K, V + 1], the last column the denominator's.

    Returns:
        o [B, T, H_v, V] in v's dtype, and the final state [B, H_v, K, V + 1] or None.

    Raises:
        ValueError, ExchangeError: as `linear_attention`.
    """
    with broadcast_errors(sp):
        check_inputs(q, k, v)
        eps = _checked(eps)
    dtype = state_dtype(v.dtype)
    o, final_state = linear_attention(
        q.to(dtype),
        k.to(dtype),
        pad(v.to(dtype), (0, 1), value=1.0),
        g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        causal=causal,
        cu_seqlens=cu_seqlens,
        sp=sp,
        backend=backend,
    )
    return _divided(o, eps, v), final_state


def normalized_linear_attention_begin(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    eps: float = 1e-6,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    causal: bool = True,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    sp: SequenceParallel | None = None,
    backend: str = "auto",
) -> PendingOutputs:
    """Start `normalized_linear_attention` before its queries are known; see `linear_attention_begin`."""
    with broadcast_errors(sp):
        check_keys(k, v)
        eps = _checked(eps)
    dtype = state_dtype(v.dtype)
    pending = linear_attention_begin(
        k.to(dtype),
        pad(v.to(dtype), (0, 1), value=1.0),
        g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        causal=causal,
        cu_seqlens=cu_seqlens,
        sp=sp,
        backend=backend,
    )

    def finish(q: Tensor) -> tuple[Tensor, Tensor | None]:
        with broadcast_errors(sp):
            check_queries(q, k)
        o, final_state = pending.finish(q.to(dtype))
        return _divided(o, eps, v), final_state

    return PendingOutputs(finish)


def _checked(eps: float) -> float:
    return number("eps", eps, "a number >= 0", lambda eps: 0 <= eps < inf)


def _divided(o: Tensor, eps: float, v: Tensor) -> Tensor:
    return (o[..., :-1] / (o[..., -1:] + eps)).to(v.dtype)
