"""Linear attention with any decay, and its normalised form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from lasp.kernels.select import select
from lasp.ops.call import called, check_initial, initial_of, packed, scale_of, ungrouped
from lasp.ops.checks import check_gate, check_gate_values, check_inputs
from lasp.ops.scan import ScanPlan, not_traced_before, refuse_final_in_graph, scan, untraced
from lasp.recurrence.decay import state_dtype
from lasp.recurrence.stages import DecayInputs, Stages
from lasp.sequence import SequenceParallel
from lasp.sequence.arguments import check_flags, number
from lasp.sequence.validation import broadcast_errors, check_shard


def linear_attention(
    q: Tensor | Callable[[], Tensor],
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    causal: bool = True,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    sp: SequenceParallel | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with any decay: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t.

    The gate's rank names the recurrence: None (plain linear attention), [H_v] (a constant per head: RetNet,
    Lightning attention, TransNormerLLM), [B, T, H_v] (a gate per head: Mamba-2, simple GLA), [B, T, H_v, K] (a gate
    per key channel: GLA). With `sp`, T is this rank's part of a longer sequence, and the result is as if one device
    had computed all of it (LASP, arXiv 2404.02882).

    Args:
        q, k: [B, T, H, K], fp64, fp32, bf16 or fp16. q may be a function that gives it: where fused kernels run on
            several ranks it is called while the state is on its way, and hides the exchange behind what it computes.
        v: [B, T, H_v, V] of the same dtype; H_v a multiple of H. Value head h uses query head h // (H_v // H).
        g: natural logarithm of the decay, <= 0, any floating dtype; it is used in the state's. On a GPU, where looking
            would wait for it, a value that is positive or NaN makes an assertion on the device fail ("torch") or gives
            NaN from its token on ("triton").
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
        backend: "torch" (chunked, any device), "triton" (fused kernels on a GPU; bf16, fp16 and fp32, K and V up to
            256) or "reference" (token by token, slow, exact); "auto" is "triton" where that
            runs, else "torch", and logs which (`lasp.kernels.select`, level INFO).

    Returns:
        o [B, T, H_v, V] in v's dtype, and the final state [B, H_v, K, V] or None.

    Raises:
        ValueError: an argument does not fit.
        ExchangeError: the ranks of `sp` disagree, or one does not answer in time.
    """
    queries: Tensor = k if callable(q) else q  # to be called: keys stand for them, being laid out alike
    with broadcast_errors(sp):
        check_inputs(queries, k, v)
        check_flags(causal=causal, output_final_state=output_final_state)
        check_shard(sp, k.shape[1])
        if g is not None:
            if not causal:
                raise ValueError("causal=False has no order in which to decay: g must be None")
            check_gate(g, k, v)
            g = g.to(state_dtype(k.dtype))
        documents = packed(cu_seqlens, k.shape[0], k.shape[1], sp)
        if documents is not None and not causal:
            raise ValueError("causal=False sees the whole sequence: cu_seqlens must be None")
        x = DecayInputs(queries, k, v, g, scale_of(k, scale), documents)
        check_initial(x, initial_state)
        stages = select("decay" if causal else "unmasked", backend, x)
        if g is not None and not (g.is_cuda and getattr(stages, "BAD_GATES_GIVE_NAN", False)):
            check_gate_values(g)
    refuse_final_in_graph(sp, output_final_state)
    fused = getattr(stages, "fused", None)
    if fused is not None:
        run = _fused if documents is None else _untraced_fused
        return run(stages, x, q, initial_state, output_final_state, sp)
    if callable(q):  # not by _replace: PyTorch 2.11's compiler fails at a graph break that what it made lives through
        x = DecayInputs(_called(q, k, v, sp), *x[1:])
    return _scanned(stages, x, initial_state, output_final_state, causal, sp)


def _fused(
    stages: Any,
    x: DecayInputs,
    q: Tensor | Callable[[], Tensor],
    initial_state: Tensor | None,
    output_final_state: bool,
    sp: SequenceParallel | None,
) -> tuple[Tensor, Tensor | None]:
    """All at once; `q`, where it is a function, is called while the exchange is under way."""
    call, started = called(sp, "linear_attention", x, initial_state, output_final_state, causal=True), None
    if callable(q):
        if call is not None:
            started = stages.start(x, initial_state, output_final_state, call)
        x = x._replace(q=_called(q, x.k, x.v, sp))
    key = None if sp is None or sp.size == 1 else sp.key
    result: tuple[Tensor, Tensor | None] = stages.fused(x, initial_state, output_final_state, call, started, key)
    return result


# The operators of a compiled graph take no documents: the graph breaks around them.
_untraced_fused = untraced(_fused)


@not_traced_before
def _scanned(
    stages: Stages,
    x: DecayInputs,
    initial_state: Tensor | None,
    output_final_state: bool,
    causal: bool,
    sp: SequenceParallel | None,
) -> tuple[Tensor, Tensor | None]:
    """Tell the other ranks, then scan."""
    call = called(sp, "linear_attention", x, initial_state, output_final_state, causal=causal)
    plan = ScanPlan(stages, sp, call, not causal, output_final_state)
    return scan(plan, ungrouped(stages, x), initial_of(x, initial_state))


def _called(q: Callable[[], Tensor], k: Tensor, v: Tensor, sp: SequenceParallel | None) -> Tensor:
    """What `q` gives, checked."""
    queries = q()
    with broadcast_errors(sp):
        check_inputs(queries, k, v)
    return queries


def normalized_linear_attention(
    q: Tensor | Callable[[], Tensor],
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
        check_inputs(k if callable(q) else q, k, v)
        eps = number("eps", eps, "a number >= 0", lambda eps: 0 <= eps < inf)
    dtype = state_dtype(v.dtype)
    o, final_state = linear_attention(
        (lambda: _called(q, k, v, sp).to(dtype)) if callable(q) else q.to(dtype),
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
    return (o[..., :-1] / (o[..., -1:] + eps)).to(v.dtype), final_state
