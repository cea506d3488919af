"""Heads wider than the kernels take, cut into several: the same stages, of narrower heads.

Columns of values do not know of one another, whatever the transition. Nor do a state's rows where a decay acts on each
by itself: the outputs are then a sum over parts of the channels of q and k. (Those of a delta rule do, through k.)

H query heads with G value heads each become heads in the order [H, parts of K, G, parts of V]: a value head still reads
query head h_v // (H_v // H), and the parts of one head's values are neighbours, which find its q and k in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.algebra import Dense, Diagonal, Scalar, Summary, Transition
from lasp.kernels.limits import FUSED_MAX_DIM
from lasp.recurrence.inputs import DecayInputs, DeltaInputs
from lasp.recurrence.stages import AnyStages, Gradients, Saved, Unsummarized

Given: TypeAlias = DecayInputs | DeltaInputs
# Parts are of a multiple of so many columns: rows of 16 bytes.
PART = 8
GATES = 2  # beta and g, which follow q, k and v; then an erase key, if there is one


def _widened(tensor: Tensor, dim: int, columns: int) -> Tensor:
    """Add zeros behind, up to so many columns of `dim` (negative)."""
    missing = columns - tensor.shape[dim]
    return tensor if missing == 0 else pad(tensor, (0, 0) * (-dim - 1) + (0, missing))


class HeadCut(NamedTuple):
    """A way to cut heads: [H, G] of them, K and V of each, into `keys` parts of K and `values` of V.

    shared: kernels let neighbouring value heads share gates per channel: parts of values need none of their own.
    """

    heads: tuple[int, int]
    K: int
    V: int
    keys: int
    values: int
    shared: bool

    @property
    def parts(self) -> tuple[int, int, int, int]:
        H, G = self.heads
        return H, self.keys, G, self.values

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of a part of K and of V; the last may end in zeros."""
        k, v = -(-self.K // self.keys), -(-self.V // self.values)
        return k if self.keys == 1 else -(-k // PART) * PART, v if self.values == 1 else -(-v // PART) * PART

    def of_keys(self, tensor: Tensor) -> Tensor:
        """[B, T, H, K] -> [B, T, heads, width]."""
        return _widened(tensor, -1, self.keys * self.widths[0]).unflatten(3, (self.keys, -1)).flatten(2, 3)

    def whole_keys(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(2, (-1, self.keys)).flatten(3)[..., : self.K]

    def of_values(self, tensor: Tensor) -> Tensor:
        """[B, T, H_v, V] -> [B, T, heads, width], once for each part of K."""
        each = _widened(tensor, -1, self.values * self.widths[1]).unflatten(3, (self.values, -1))
        return each.unflatten(2, self.heads)[:, :, :, None].expand(-1, -1, *self.parts, -1).flatten(2, 5).contiguous()

    def whole_values(self, tensor: Tensor) -> Tensor:
        """The sum over the parts of K."""
        parts = tensor.unflatten(2, self.parts)
        parts = parts[:, :, :, 0] if self.keys == 1 else parts.sum(3, dtype=torch.float32).to(tensor.dtype)
        return parts.flatten(2, 3).flatten(3)[..., : self.V]

    def of_gates(self, tensor: Tensor) -> Tensor:
        """[.., H_v], which all parts share; [B, T, H_v, K]."""
        if tensor.dim() < 4:
            each = tensor.unflatten(-1, self.heads)[..., :, None, :, None]
            return each.expand(*tensor.shape[:-1], *self.parts).flatten(-4)
        each = _widened(tensor, -1, self.keys * self.widths[0]).unflatten(2, self.heads).unflatten(4, (self.keys, -1))
        each = each.movedim(4, 3)
        if not self.shared:
            each = each[:, :, :, :, :, None].expand(-1, -1, *self.parts, -1).flatten(4, 5)
        return each.flatten(2, 4)

    def summed_gates(self, tensor: Tensor) -> Tensor:
        """The gradients of all that share one."""
        if tensor.dim() < 4:
            return tensor.unflatten(-1, self.parts).sum((-3, -1)).flatten(-2)
        parts = tensor.unflatten(2, self.parts[:3]) if self.shared else tensor.unflatten(2, self.parts).sum(5)
        parts = parts.movedim(3, 4)
        return parts.flatten(2, 3).flatten(3)[..., : self.K]

    def of_state(self, tensor: Tensor | None) -> Tensor | None:
        """[n, H_v, K, V] -> [n, heads, width, width]."""
        if tensor is None:
            return None
        (k, v), wide = self.widths, _widened(tensor, -1, self.values * self.widths[1])
        wide = _widened(wide, -2, self.keys * k).unflatten(3, (self.values, v)).unflatten(2, (self.keys, k))
        return wide.unflatten(1, self.heads).permute(0, 1, 3, 2, 5, 4, 6).flatten(1, 4).contiguous()

    def whole_state(self, tensor: Tensor) -> Tensor:
        parts = tensor.unflatten(1, self.parts).permute(0, 1, 3, 2, 5, 4, 6)
        return parts.flatten(5).flatten(3, 4).flatten(1, 2)[:, :, : self.K, : self.V].contiguous()

    def whole_transition(self, transition: Transition) -> Transition:
        if isinstance(transition, Scalar):
            return Scalar(transition.log_decay.unflatten(1, self.parts)[:, :, 0, :, 0].flatten(1))
        if isinstance(transition, Diagonal):
            parts = transition.log_decay.unflatten(1, self.parts)[:, :, :, :, 0].movedim(2, 3)
            return Diagonal(parts.flatten(1, 2).flatten(2)[..., : self.K])
        if isinstance(transition, Dense):  # whose rows are not cut
            return Dense(transition.matrix[:, :: self.values].contiguous())
        return transition

    def whole_summary(self, summary: Summary) -> Summary:
        return Summary(self.whole_transition(summary.transition), self.whole_state(summary.state))

    def of_inputs(self, x: Given) -> Given:
        q, k, v, *others = x.tensors()
        assert q is not None and k is not None and v is not None
        gates, erase_key = others[:GATES], others[GATES:]
        cut = [None if gate is None else self._of_gate(gate) for gate in gates]
        keys, erasing = self.of_keys(k), (self.of_keys(r) for r in erase_key if r is not None)
        return x.with_tensors((keys if q is k else self.of_keys(q), keys, self.of_values(v), *cut, *erasing))

    def _of_gate(self, gate: Tensor) -> Tensor:
        """Cut it, its gradient wanted where the whole one's is, which launches go by."""
        return self.of_gates(gate.detach()).requires_grad_(gate.requires_grad)

    def whole_gradients(self, gradients: Gradients) -> Gradients:
        dq, dk, dv, *others = gradients
        assert dq is not None and dk is not None and dv is not None
        gates, erase_key = others[:GATES], others[GATES:]
        own = (None if gate is None else self.summed_gates(gate) for gate in gates)
        erasing = (self.whole_keys(dr) for dr in erase_key if dr is not None)
        return self.whole_keys(dq), self.whole_keys(dk), self.whole_values(dv), *own, *erasing


def cut_of(x: Given, *, rows: bool, shared: bool) -> HeadCut:
    """The way to cut x's heads. rows: those of states may be cut. shared: as in `HeadCut`."""
    (H, K), (H_v, V) = x.q.shape[2:], x.v.shape[2:]
    return HeadCut((H, H_v // H), K, V, -(-K // FUSED_MAX_DIM) if rows else 1, -(-V // FUSED_MAX_DIM), shared)


class CutRun:
    """A run of wide heads, whole, and what stages of narrower ones make of it: `inner`."""

    def __init__(self, given: Given, alone: bool, cut: HeadCut, stages: AnyStages) -> None:
        self._given, self._alone, self.cut, self._stages = given, alone, cut, stages

    @cached_property
    def inner(self) -> Any:
        return self._stages.prepare(self.cut.of_inputs(self._given), self._alone)

    @property
    def v(self) -> Tensor:
        return self._given.v

    @property
    def g(self) -> Tensor | None:
        return self._given.g

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self._given.tensors()

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> CutRun:
        return CutRun(self._given.with_tensors(tensors), self._alone, self.cut, self._stages)

    def saved(self, whole: Saved) -> Saved:
        """Give back what the narrower stages save: first the state that leaves the run."""
        leaving = self.cut.of_state(whole[0])
        assert leaving is not None
        return leaving, *whole[1:]


def cutting(stages: AnyStages, *, rows: bool, shared: bool) -> AnyStages:
    """`stages` with those for heads wider than they take; rows: those of states may be cut; shared: as in `HeadCut`.

    What `stages` save must begin with the state that leaves the run.
    """
    alone = stages.unsummarized
    assert alone is not None

    def prepare(given: Given, from_zero: bool) -> CutRun:
        run = CutRun(given, from_zero, cut_of(given, rows=rows, shared=shared), stages)
        run.inner  # noqa: B018  raises where the kernels do not take such tensors
        return run

    def summarize(x: CutRun) -> tuple[Summary, Any]:
        summary, totals = stages.summarize(x.inner)
        return x.cut.whole_summary(summary), totals

    def outputs(x: CutRun, totals: Any, partial: Any, state_in: Tensor | None) -> tuple[Tensor, Saved]:
        o, saved = stages.outputs(x.inner, totals, partial, x.cut.of_state(state_in))  # type: ignore[arg-type]
        return x.cut.whole_values(o), (x.cut.whole_state(saved[0]), *saved[1:])

    def summarize_adjoint(x: CutRun, saved: Saved, d_o: Tensor) -> tuple[Summary, Any]:
        summary, totals = stages.summarize_adjoint(x.inner, x.saved(saved), x.cut.of_values(d_o))
        return x.cut.whole_summary(summary), totals

    def gradients(
        x: CutRun, saved: Saved, totals: Any, local: Any, d_o: Tensor, d_state_out: Tensor | None
    ) -> Gradients:
        inner = (x.inner, x.saved(saved), totals, local, x.cut.of_values(d_o), x.cut.of_state(d_state_out))
        return x.cut.whole_gradients(stages.gradients(*inner))  # type: ignore[arg-type]

    def empty_saved(x: Any, *ways: bool) -> list[Tensor]:
        assert stages.empty_saved is not None
        cut = cut_of(x, rows=rows, shared=shared)
        leaving, *others = stages.empty_saved(cut.of_inputs(x), *ways)
        return [cut.whole_state(leaving), *others]

    wide = replace(
        stages,
        prepare=prepare,
        summarize=summarize,
        local_outputs=lambda x, totals: stages.local_outputs(x.inner, totals),
        outputs=outputs,
        summarize_adjoint=summarize_adjoint,
        local_gradients=lambda x, saved, totals, d_o: stages.local_gradients(
            x.inner, x.saved(saved), totals, x.cut.of_values(d_o)
        ),
        gradients=gradients,
        unsummarized=Unsummarized(
            lambda x: alone.totals(x.inner),
            lambda x, saved, d_o: alone.totals_adjoint(x.inner, x.saved(saved), x.cut.of_values(d_o)),
            alone.leaving,
        ),
        empty_saved=None if stages.empty_saved is None else empty_saved,
        weighs=None,
    )
    return replace(stages, wide=wide)
