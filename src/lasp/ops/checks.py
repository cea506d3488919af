"""Checks arguments, tells the other ranks and spreads grouped heads: every operator's work around its scan."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from lasp.exchange.start import SequenceCall
from lasp.ops.scan import ScanPlan
from lasp.recurrence.documents import Documents, documents_here
from lasp.recurrence.inputs import Inputs, initial_shape, state_dtype
from lasp.recurrence.stages import AnyStages
from lasp.recurrence.untraced import untraced
from lasp.sequence import SequenceParallel
from lasp.sequence.arguments import as_operand, check_floats, check_tensor, number
from lasp.sequence.shards import document_bounds, document_digest

_Inputs = TypeVar("_Inputs", bound=Inputs)
_FORM = "[B, T, H, D]"
_GATES = ("[H_v]", "[B, T, H_v]", "[B, T, H_v, K]")


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k [B, T, H, K] and v [B, T, H_v, V], of one floating dtype, on one device.

    Raises:
        ValueError: they are not.
    """
    check_floats("q", q, _FORM, 4)
    _check_alike("k", k, "q", q)
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}")
    _check_values_fit(v, "q", q)


def check_keys(k: Tensor, v: Tensor) -> None:
    """Check what `check_inputs` does, where q is to come.

    Raises:
        ValueError: k or v does not fit.
    """
    check_floats("k", k, _FORM, 4)
    _check_values_fit(v, "k", k)


def _check_alike(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    check_floats(name, tensor, _FORM, 4)
    if tensor.dtype != other.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {like} {other.dtype} and {name} {tensor.dtype}")
    if tensor.device != other.device:
        given = f"{like} on {other.device} and {name} on {tensor.device}"
        raise ValueError(f"q, k and v must be on one device, got {given}")


def _check_values_fit(v: Tensor, like: str, other: Tensor) -> None:
    _check_alike("v", v, like, other)
    B, T, H, K = other.shape
    v_B, v_T, H_v, V = v.shape
    if v_B != B or v_T != T:
        raise ValueError(f"v must have {like}'s batch and tokens {(B, T)}, got {(v_B, v_T)}")
    if not (H and K and V) or H_v % H:
        raise ValueError(
            f"v's heads must be a multiple of {like}'s and no dim but B and T may be 0; got {like} "
            f"{(B, T, H, K)}, v {(v_B, v_T, H_v, V)}"
        )


def check_queries(q: Tensor, k: Tensor) -> None:
    """q has k's shape, dtype and device.

    Raises:
        ValueError: it does not.
    """
    check_tensor("q", q, "as k")
    if q.shape != k.shape or q.dtype != k.dtype or q.device != k.device:
        given = f"{tuple(q.shape)}, {q.dtype}, on {q.device}"
        raise ValueError(f"q must be as k, {tuple(k.shape)}, {k.dtype}, on {k.device}; got {given}")


def check_gate(g: Tensor, q: Tensor, v: Tensor, *, constant: bool = True) -> None:
    """g [H_v] (where `constant` decays are allowed), [B, T, H_v] or [B, T, H_v, K], floating point.

    Raises:
        ValueError: the shape, dtype or device does not fit.
    """
    check_tensor("g", g, "of log-decays")
    each, keys = tuple(v.shape[:3]), q.shape[3]
    shapes = (each[2:], each, (*each, keys))
    if tuple(g.shape) not in (shapes if constant else shapes[1:]):
        *others, last = [f"{name} {shape}" for name, shape in zip(_GATES, shapes, strict=True)][not constant :]
        raise ValueError(f"g must be {', '.join(others)} or {last}, got {tuple(g.shape)}")
    if not g.is_floating_point() or g.device != q.device:
        raise ValueError(f"g must be floating point on {q.device}, got {g.dtype} on {g.device}")


def check_weights(log_weight: Tensor | None, skip: Tensor | None, v: Tensor) -> None:
    """Check that log_weight is [B, T, H_v] and skip [H_v], where given.

    Raises:
        ValueError: the shape, dtype or device does not fit.
    """
    if log_weight is None and skip is None:
        return
    given = {"log_weight": (log_weight, "[B, T, H_v]", v.shape[:3]), "skip": (skip, "[H_v]", v.shape[2:3])}
    for name, (tensor, form, shape) in given.items():
        if tensor is None:
            continue
        check_tensor(name, tensor, form)
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {form} {tuple(shape)}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.device != v.device:
            raise ValueError(f"{name} must be floating point on {v.device}, got {tensor.dtype} on {tensor.device}")


def check_gate_values(g: Tensor) -> None:
    """g is a natural logarithm of a decay.

    Raises:
        ValueError: a value is positive or NaN, on CPU; on a GPU an assertion on the device fails.
    """
    if _are_unchecked():
        return
    message = "g is the natural logarithm of the decay and must be <= 0 (for a decay a in (0, 1], pass a.log())"
    _check_values(g <= 0, message, lambda: f"a largest value of {g.max().item():g}")


def check_beta(beta: Tensor, v: Tensor) -> None:
    """Check that beta is [B, T, H_v].

    Raises:
        ValueError: the shape, dtype or device does not fit.
    """
    check_tensor("beta", beta, "[B, T, H_v]")
    if beta.shape != v.shape[:3]:
        raise ValueError(f"beta must be [B, T, H_v] {tuple(v.shape[:3])}, got {tuple(beta.shape)}")
    if not beta.is_floating_point() or beta.device != v.device:
        raise ValueError(f"beta must be floating point on {v.device}, got {beta.dtype} on {beta.device}")


def check_erase_key(erase_key: Tensor, k: Tensor, normalize_qk: bool) -> None:
    """Check that an erase key is as k, whose length nobody changes.

    Raises:
        ValueError: it does not fit.
    """
    check_tensor("erase_key", erase_key, "of k's shape")
    if erase_key.shape != k.shape or erase_key.dtype != k.dtype or erase_key.device != k.device:
        given = f"{tuple(erase_key.shape)}, {erase_key.dtype}, on {erase_key.device}"
        raise ValueError(f"erase_key must be as k, {tuple(k.shape)}, {k.dtype}, on {k.device}; got {given}")
    if normalize_qk:
        raise ValueError("normalize_qk=True cannot be had with erase_key: normalize keys before, or leave it out")


def check_beta_values(beta: Tensor) -> None:
    """Check that beta is in [0, 2].

    Raises:
        ValueError: a value is outside or NaN, on CPU; on a GPU an assertion on the device fails.
    """
    if _are_unchecked():
        return
    _check_values(
        (beta >= 0) & (beta <= 2),
        "beta must be in [0, 2] (sigmoid, or twice it for negative eigenvalues)",
        lambda: f"values from {beta.min().item():g} to {beta.max().item():g}",
    )


@contextmanager
def values_unchecked() -> Iterator[None]:
    """Within, gates may have any values: of a model whose own code makes them, so that only NaN can be wrong with one.

    It then comes out as a NaN loss, which training programs report, where an assertion on a GPU ends the process.
    """
    before, _unchecked.now = _unchecked.now, True
    try:
        yield
    finally:
        _unchecked.now = before


class _Unchecked(threading.local):
    now = False


_unchecked = _Unchecked()


def _are_unchecked() -> bool:
    return not torch.compiler.is_compiling() and _unchecked.now


def _check_values(good: Tensor, message: str, found: Callable[[], str]) -> None:
    """Check that all are `good`: at once where that needs no synchronisation (on CPU), else when it is computed."""
    if good.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(good.all(), message)
    elif not bool(good.all()):
        raise ValueError(f"{message}; got {found()}")


def check_state(state: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Check that `state` is an initial_state [B, H_v, K, V] in the state's dtype.

    Raises:
        ValueError: it is not.
    """
    check_tensor("initial_state", state, "[B, H_v, K, V]")
    dtype = state_dtype(like.dtype)
    if tuple(state.shape) != shape or state.dtype != dtype or state.device != like.device:
        raise ValueError(
            f"initial_state must be [B, H_v, K, V] {shape}, {dtype}, on {like.device}; got {tuple(state.shape)}, "
            f"{state.dtype}, on {state.device}"
        )


def read_later(cu_seqlens: Tensor | Sequence[int] | None, stages: AnyStages) -> Tensor | None:
    """The packed documents, if this is a compiled graph whose operators look into them when they run; else None."""
    if cu_seqlens is None or stages.empty_saved is None or not torch.compiler.is_compiling():
        return None
    return as_operand(cu_seqlens)


def packed(
    cu_seqlens: Tensor | Sequence[int] | None,
    batch: int,
    tokens: int,
    sp: SequenceParallel | None,
    *,
    traceable: bool = False,
) -> Documents | None:
    """The documents on this rank, which holds `tokens` tokens of each of `batch` sequences.

    traceable: torch.compile can follow what is done with them, where they are no tensor and this rank is alone.

    Raises:
        ValueError: cu_seqlens does not describe the whole sequence, or there are several sequences.
    """
    if cu_seqlens is None:
        return None
    follows = traceable and not isinstance(cu_seqlens, Tensor) and (sp is None or sp.size == 1)
    return (_read_documents if follows else _documents_here)(cu_seqlens, batch, tokens, sp)


def _read_documents(
    cu_seqlens: Tensor | Sequence[int], batch: int, tokens: int, sp: SequenceParallel | None
) -> Documents:
    total = tokens if sp is None else sp.total(tokens)
    bounds = document_bounds(cu_seqlens, total, batch)
    return documents_here(bounds, 0 if sp is None else sp.offset(tokens), tokens)


# Outside of compiled graphs, which break around what is done with them.
_documents_here = untraced(
    _read_documents, "packed documents without fused kernels, but as numbers and of a decay on one device,"
)


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor of the outputs: K ** -0.5 where none is given.

    Raises:
        ValueError: it is no finite constant.
    """
    return q.shape[3] ** -0.5 if scale is None else number("scale", scale)


def check_initial(x: Inputs, initial_state: Tensor | None, bounds: Tensor | None = None) -> None:
    """The initial state, if there is one, fits. bounds: of packed documents that `x` does not know yet.

    Raises:
        ValueError: it does not.
    """
    if initial_state is not None:
        shape = initial_shape(x)
        check_state(initial_state, shape if bounds is None else (bounds.shape[0] - 1, *shape[1:]), x.q)


def called(plan: ScanPlan, x: Inputs, initial_state: Tensor | None) -> SequenceCall | None:
    """Tell the other ranks what is about to be computed; what is sent for it is then part of this call.

    None without other ranks, and in a compiled graph, where the exchange does so itself when it runs.
    """
    sp = plan.ranks
    if sp is None or torch.compiler.is_compiling():
        return None
    tensors = x.tensors()
    learned = any(tensor is not None and tensor.requires_grad for tensor in (*tensors, initial_state))
    differentiable = torch.is_grad_enabled() and learned
    gate_dims = None if x.g is None else x.g.dim()
    start = "none" if initial_state is None else f"requires_grad={initial_state.requires_grad}"
    # Looked up in every step; what the ranks compare is written out only when it is new.
    key = (
        x.q.shape, x.v.shape, x.q.dtype, gate_dims, x.scale, start, plan.want_final, differentiable,
        *plan.options.values(),
    )  # fmt: skip

    def fields() -> dict[str, object]:
        return {
            "batch": x.q.shape[0],
            "tokens (pass lengths= to SequenceParallel for unequal shards)": (
                x.q.shape[1] if sp.lengths is None else "by lengths"
            ),
            "heads of q and v": (x.q.shape[2], x.v.shape[2]),
            "K and V": (x.q.shape[3], x.v.shape[3]),
            "dtype": str(x.q.dtype),
            "gate dims": gate_dims,
            "scale": x.scale,
            "initial_state": start,
            "output_final_state": plan.want_final,
            "gradients": differentiable,
            **plan.options,
        }

    documents = None if x.documents is None else document_digest(x.documents.cu_seqlens)
    return sp.call(plan.operator, key, fields, documents, tensors, replays=True)


def ungrouped(x: _Inputs) -> _Inputs:
    """x with a query head for every value head, for stages that cannot share them."""
    groups = x.v.shape[2] // x.q.shape[2]
    if groups == 1:
        return x
    q, k, v, *others = x.tensors()
    gates, erase_key = others[:2], others[2:]  # beta and g
    q, k, *erase_key = (None if t is None else t.repeat_interleave(groups, 2) for t in (q, k, *erase_key))
    return x.with_tensors((q, k, v, *gates, *erase_key))
