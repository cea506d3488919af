"""The base of every sequence mixer: a layer, its configuration, and what analysis asks of it.

B = batch, T = tokens here, D = d_model, H = heads of queries and keys, H_v = of values, K, V = channels of a head.

A mixer runs in three parts: `before` and `after` work token by token, and the operator between them is all that knows
of other tokens and other ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lasp.halo.functions import FUSED_WIDTH
from lasp.kernels.select import BACKENDS, has_fused_delta_rules, has_fused_kernels
from lasp.layers.fields import check_choice, check_fields
from lasp.layers.recomputed import recomputed_around_scans
from lasp.layers.short_convolution import ShortConvolution
from lasp.layers.state import RecurrentState
from lasp.ops.pending import PendingOutputs
from lasp.sequence.arguments import check_flags, check_floats, check_kind, positive, whole
from lasp.sequence.sequence_parallel import broadcast_errors, check_shard

if TYPE_CHECKING:
    from lasp.sequence import SequenceParallel

LayerState = Tensor | RecurrentState


class LayerContext(NamedTuple):
    """The model around a layer.

    Attributes:
        d_model: D.
        layer, num_layers: which layer this is, from 0, and of how many.
        norm_eps: added to the mean square in norms.
        backend: of the operator.
    """

    d_model: int
    layer: int = 0
    num_layers: int = 1
    norm_eps: float = 1e-5
    backend: str = "auto"


class Operator(NamedTuple):
    """The shape of the operator that a mixer calls.

    Attributes:
        rule: "linear" (a state is decayed and added to), "delta" (and corrected) or "softmax" (no state).
        num_heads, num_key_heads: H_v and H.
        key_dim, value_dim: K and V as the operator sees them, after feature maps and positions.
        decay: "none", "constant" (one number a head), "head" (a gate a head) or "channel" (a gate a key channel).
    """

    rule: str
    num_heads: int
    num_key_heads: int
    key_dim: int
    value_dim: int
    decay: str = "none"

    @property
    def transition(self) -> int | None:
        """Numbers of a head's transition: 0, 1, K or K * K; None of softmax attention."""
        if self.rule != "linear":
            return self.key_dim**2 if self.rule == "delta" else None
        return {"none": 0, "constant": 1, "head": 1, "channel": self.key_dim}[self.decay]

    @property
    def state_numbers(self) -> int:
        """Numbers of a sequence's state, of fixed size; 0 of softmax attention, whose memory grows."""
        return 0 if self.rule == "softmax" else self.num_heads * self.key_dim * self.value_dim

    def flops(self, context: int) -> float:
        """Operations for a token in a sequence of `context` tokens: a state is added to and read, by delta rules read
        once more; a token of softmax attention sees half of the context on average."""
        if self.rule == "softmax":
            return float(self.num_heads * context * (self.key_dim + self.value_dim))
        return 2.0 * (3 if self.rule == "delta" else 2) * self.state_numbers


class SavedActivations(NamedTuple):
    """Numbers that autograd keeps of a part of a layer, for one token.

    Attributes:
        narrow: in the dtype of matrix products.
        wide: in fp32.
        inputs: projections that read one tensor of width D. In fp32 they keep it once, under autocast a 16-bit copy
            each.
    """

    narrow: float
    wide: float
    inputs: int

    def nbytes(self, width: int, precision: str) -> float:
        if precision == "fp32":
            return 4 * (self.narrow + self.wide + width * (self.inputs > 0))
        return 2 * (self.narrow + width * self.inputs) + 4 * self.wide


class MixerCost(NamedTuple):
    """The needs of a mixer besides its parameters, which are counted.

    Attributes:
        operator: all that is exchanged but the halo follows from it.
        saved: short shards of gates and norm statistics count too; rows of padding and states do not.
        gates: channels of output gates, decays and betas, which an all-to-all has to move as well.
        convolved, conv_width: channels and width of the short convolution, whose halo is exchanged; 0 for none.
    """

    operator: Operator
    saved: SavedActivations
    gates: int = 0
    convolved: int = 0
    conv_width: int = 0


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """The base of mixers' configurations.

    Fields are plain values. Fields of one meaning have one name in all mixers: by it the command line sets them.

    Attributes:
        num_heads: H_v.
        key_dim, value_dim: K and V of one head, as projected.
    """

    num_heads: int
    key_dim: int
    value_dim: int

    kind: ClassVar[str]
    """Its name in MIXERS."""
    layer: ClassVar[type[Mixer]]
    """What it builds."""
    rule: ClassVar[str] = "linear"
    """That of its operator: "linear", "delta" or "softmax", whose memory grows with the tokens that it has seen."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("num_heads", "key_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {getattr(self, name)!r}")

    def build(self, context: LayerContext) -> Mixer:
        """The layer, its weights from torch's default generator."""
        return self.layer(self, context)

    def cost(self, context: LayerContext) -> MixerCost:
        """The layer's needs: for `lasp plan`, model FLOP utilisation and `lasp report`."""
        raise NotImplementedError(f"mixer {self.kind!r} does not say what it costs")

    @property
    def knows_positions(self) -> bool:
        """True if the layer tells positions apart; softmax layers beside it then rotate queries and keys."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain values, `kind` among them."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


class MixerInputs(NamedTuple):
    """Results of `Mixer.before`.

    Attributes:
        k: [B, T, H, K]. v: [B, T, H_v, V].
        log_decay, log_weight: as the operator takes them.
        beta: [B, T, H_v], of delta rules.
        q: [B, T, H, K], where it is known already; else `Mixer.queries` makes it.
        kept: what `Mixer.after` reads beside the operator's outputs.
    """

    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    q: Tensor | None = None
    log_weight: Tensor | None = None
    kept: tuple[Tensor, ...] = ()


class Mixer(nn.Module):
    """The base of mixers: x [B, T, D] -> y [B, T, D] and a state.

    A mixer gives `before`, `begin` and `after`, and `queries` where something needs no other rank, so that it hides
    the exchange; with a short convolution also `project`. `forward` runs them, for all mixers alike.

    Attributes:
        recomputes: whether in compiled graphs all that comes after `project`, but the recurrence, runs again in the
            backward pass.
    """

    recomputes: ClassVar[bool] = False

    def __init__(self, config: MixerConfig, context: LayerContext) -> None:
        super().__init__()
        check_kind("config", config, getattr(type(self), "Config", MixerConfig))
        _check_context(context)
        self.config, self.backend, self.d_model = config, context.backend, context.d_model
        self.convolution: ShortConvolution | None = None
        # Widths of those that `before` takes the convolution's output in; it takes that whole if None. Columns behind
        # those that are convolved come as one more part.
        self.parts_of_convolution: tuple[int, ...] | None = None
        self.passing = 0

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Token by token, what `before` reads; of it the short convolution, if there is one, takes the first, and puts
        its parts in that place."""
        return (x,)

    def before(self, parts: tuple[Tensor, ...], start: int) -> MixerInputs:
        """Token by token, from what `project` gave to what the operator takes: projections, maps, positions, gates."""
        raise NotImplementedError

    def queries(self, x: Tensor, inputs: MixerInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Token by token, q [B, T, H, K] and what `after` reads, computed while the state is under way."""
        assert inputs.q is not None
        return inputs.q, inputs.kept

    def begin(self, inputs: MixerInputs, **sequence: Any) -> PendingOutputs:
        """The operator, begun: what it needs of other ranks is under way. sequence: its common keywords."""
        raise NotImplementedError

    def after(self, o: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """Token by token, from o [B, T, H_v, V] to y [B, T, D]: norm, gate, projection."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        start: int | None = None,
        state: LayerState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        sp: SequenceParallel | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """Mix.

        Args:
            x: [B, T, D]. Under sequence parallelism T is this rank's share.
            start: global position of x's first token; by default 0, or under `sp` where this rank's tokens lie.
            state: what came before the whole sequence, as the layer gave it; nothing if None.
            output_state: also return the state after the whole sequence: [B, H_v, K, V] in fp32 (fp64 for fp64 x), of
                a layer with a short convolution that and the window; of softmax attention keys beside values.
            cu_seqlens: of packed documents, global; see `lasp.linear_attention`.
            sp: the ranks that share the sequence.

        Returns:
            y [B, T, D] and the state, or None unless asked for.

        Raises:
            ValueError: an argument does not fit, or the state is of another kind of layer; else as the operator.
        """
        with broadcast_errors(sp):
            self._check(x, start, state, output_state)
            if start is None:
                check_shard(sp, x.shape[1])
                start = 0 if sp is None else sp.offset(x.shape[1])
        parts = self.project(x)
        again = self.recomputes and state is None and not output_state and torch.is_grad_enabled()
        if again and torch.compiler.is_compiling() and self.has_operators(x.device, parts[0].dtype):
            return recomputed_around_scans(partial(self._stateless, start, cu_seqlens, sp), x, *parts), None
        o, kept, state = self._mixed(
            x, parts, start, state, output_final_state=output_state, cu_seqlens=cu_seqlens, sp=sp
        )
        return self.after(o, kept), state

    def has_operators(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Say whether compiled graphs take as operators all that looks at other tokens: a graph is then for any number
        of tokens, any packed documents, and over ranks too."""
        if self.backend not in ("auto", "triton") or not has_fused_kernels(device, dtype):
            return False
        if self.convolution is not None and self.convolution.weight.shape[1] > FUSED_WIDTH:
            return False
        return self.config.rule != "delta" or has_fused_delta_rules(device, dtype, self.config.key_dim)

    def _mixed(
        self, x: Tensor, parts: tuple[Tensor, ...], start: int, state: LayerState | None, **sequence: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], LayerState | None]:
        """Give what `after` takes, and the state after the sequence."""
        memory, window = state if isinstance(state, RecurrentState) else (state, None)
        if self.convolution is not None:
            mixed, window = self.convolution(
                parts[0],
                state=window,
                output_state=sequence["output_final_state"],
                cu_seqlens=sequence["cu_seqlens"],
                sp=sequence["sp"],
                widths=self.parts_of_convolution,
                passing=self.passing,
            )
            parts = (*([mixed] if self.parts_of_convolution is None else mixed), *parts[1:])
        inputs = self.before(parts, start)
        pending = self.begin(inputs, initial_state=memory, **sequence)
        q, kept = self.queries(x, inputs)
        o, memory = pending.finish(q)
        if self.convolution is None or memory is None or window is None:
            return o, kept, memory
        return o, kept, RecurrentState(memory, window)

    def _stateless(
        self,
        start: int,
        cu_seqlens: Tensor | Sequence[int] | None,
        sp: SequenceParallel | None,
        x: Tensor,
        *parts: Tensor,
    ) -> Tensor:
        """Give y alone, without a state before or after."""
        o, kept, _ = self._mixed(x, parts, start, None, output_final_state=False, cu_seqlens=cu_seqlens, sp=sp)
        return self.after(o, kept)

    def _check(self, x: Tensor, start: int | None, state: LayerState | None, output_state: bool) -> None:
        check_floats("x", x, "[B, T, D]", 3)
        if x.shape[2] != self.d_model:
            raise ValueError(f"x must be [B, T, D] with D = {self.d_model}, got shape {tuple(x.shape)}")
        if state is not None and isinstance(state, RecurrentState) == (self.convolution is None):
            raise ValueError(f"state must be one that a {type(self).__name__} gave, got {type(state).__name__}")
        check_flags(output_state=output_state)
        if start is not None and not torch.compiler.is_compiling():  # where a position may be a symbol
            whole("start", start, 0)


def _check_context(context: LayerContext) -> None:
    """Raise ValueError for a context, or a field of it, that is none."""
    check_kind("context", context, LayerContext)
    for name, least in (("d_model", 1), ("layer", 0), ("num_layers", 1)):
        whole(f"context.{name}", getattr(context, name), least)
    positive("context.norm_eps", context.norm_eps)
    check_choice("context.backend", context.backend, BACKENDS)
