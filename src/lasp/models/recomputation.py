"""Other ways to run the blocks of a model in training: recomputed in the backward pass, in pieces, compiled.

They replace the `forward` of single modules, so that parameter names, hooks and everything else stay as they are.
Without gradients the blocks run as before.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lasp.exchange.start import keeping_exchanges
from lasp.kernels.select import has_fused_kernels
from lasp.layers import Mixer
from lasp.ops.autograd import TRACEABLE
from lasp.sequence.arguments import wholes

# As many as PyTorch's compiler by itself makes of a function, and more than what follows from them.
_MAX_SHAPES, _MAX_GRAPHS = 8, 256
# The compiler by itself keeps whatever a matrix product of the backward pass reads: normalized inputs, once for each
# projection, products of a feed-forward layer's halves, weights in 16 bits. All follow from what else is kept.
_KEEP_WHAT_PRODUCTS_READ = False
RECOMPUTATIONS = ("none", "selective", "full")


def recompute(block: nn.Module, recomputation: str) -> None:
    """Keep of the block's forward pass only its input, and run it again in the backward pass.

    recomputation: "full", or "selective" to keep also what a recurrence's exchange brought, one state a head, so that
        running it again exchanges nothing. Halos, and keys and values of softmax layers, are exchanged again.
    """
    options: dict[str, Any] = {"context_fn": keeping_exchanges} if recomputation == "selective" else {}
    block.forward = partial(_recomputed, _forward_of(block), options)  # type: ignore[method-assign]


def run_in_pieces(ffn: nn.Module, piece_tokens: int) -> None:
    """Run a channel mixer on `piece_tokens` tokens at a time, and again in the backward pass.

    Its hidden activations, several times as wide as the model, then exist for one piece only.
    """
    ffn.forward = partial(_in_pieces, _forward_of(ffn), piece_tokens)  # type: ignore[method-assign]


class CompiledShapes:
    """The shapes that the blocks of one model are compiled for: the first eight. Each takes the compiler seconds."""

    def __init__(self) -> None:
        self._known: set[Any] = set()
        self._is_full = False

    def admit(self, x: Tensor, sp: Any, documents: int) -> bool:
        """True if a block's input is to run compiled, with room for so many packed documents.

        All ranks of `sp` find the same: their shapes change together.
        """
        shape = (x.shape, None if sp is None else sp.key, documents)
        if shape in self._known:
            return True
        if len(self._known) < _MAX_SHAPES:
            self._known.add(shape)
            return True
        if not self._is_full:
            warnings.warn(
                f"compile=True: blocks are compiled for {_MAX_SHAPES} shapes; this one, [B, T, D] = {list(x.shape)}, "
                "and all other new ones run uncompiled. Pad sequences to a few lengths to have them compiled",
                stacklevel=4,
            )
        self._is_full = True
        return False


def compile_block(block: nn.Module, shapes: CompiledShapes) -> None:
    """Compile the block's training forward, the exchange inside it, without graph breaks.

    The graph breaks around the scan of a delta rule, over ranks around short convolutions and softmax attention too,
    and with PyTorch before 2.13 around every recurrence without fused kernels (lasp.ops.scan): what comes before and
    after is compiled. Packed documents are part of the graph, which has room for the next power of two of them, on one
    device where the recurrence of a decay without a convolution runs on fused kernels; with others blocks run
    uncompiled. So do, after a warning, inputs that `shapes` does not admit.

    shapes: one for all blocks of a model.
    """
    # Advice to whoever writes parts that are recomputed, of which ours change nothing in place.
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_no_advice)
    block.forward = _Compiled(block, shapes)  # type: ignore[method-assign]


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "context_fn is passed to torch.utils.checkpoint" not in str(record.msg)


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """The module's forward: its class's, or the one that a function here has already put in its place.

    No closure and no bound method, which a copy of the module would share with it and run on the original's weights:
    partial functions are copied and pickled with the module that they hold.
    """
    forward: Callable[..., Any] = vars(module).get("forward") or partial(type(module).forward, module)
    return forward


def _recomputed(run: Callable[..., Any], options: dict[str, Any], *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return run(*arguments)
    # Nothing in a block is random.
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


def _in_pieces(run: Callable[[Tensor], Tensor], piece_tokens: int, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return run(x)
    parts = x.split(piece_tokens, dim=1)
    return torch.cat([checkpoint(run, part, use_reentrant=False, preserve_rng_state=False) for part in parts], dim=1)


class _Compiled:
    """A block's forward, compiled at its first call. What is compiled is the block's own: a copy compiles anew."""

    def __init__(self, block: nn.Module, shapes: CompiledShapes) -> None:
        self._block, self._shapes = block, shapes
        self._compiled: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_block": self._block, "_shapes": self._shapes, "_compiled": None}

    @cached_property
    def _mixers(self) -> list[Mixer]:
        return [module for module in self._block.modules() if isinstance(module, Mixer)]

    @cached_property
    def _is_bare(self) -> bool:
        """True if there are recurrences of decays alone, and no convolutions."""
        return all(mixer.config.rule == "linear" and mixer.convolution is None for mixer in self._mixers)

    def __call__(
        self, x: Tensor, start: int, state: Any, output_state: bool, cu_seqlens: Any, sp: Any
    ) -> tuple[Tensor, Any]:
        run = MethodType(type(self._block).forward, self._block)
        takes = state is None and not output_state and torch.is_grad_enabled()
        if takes and cu_seqlens is not None:
            fused = all(mixer.backend in ("auto", "triton") for mixer in self._mixers)
            fused = fused and has_fused_kernels(x.device, x.dtype)
            takes = self._is_bare and fused and (sp is None or sp.size == 1)
            cu_seqlens = _with_room(cu_seqlens) if takes else cu_seqlens
        arguments = x, start, state, output_state, cu_seqlens, sp
        if not takes or not self._shapes.admit(x, sp, 0 if cu_seqlens is None else len(cu_seqlens) - 1):
            result: tuple[Tensor, Any] = run(*arguments)
            return result
        if self._compiled is None:
            self._compiled = torch.compile(run, fullgraph=TRACEABLE and self._is_bare, dynamic=False)
        # Under DDP the compiler would cut a block's graph at every 25 MB of weights, to sum gradients between the
        # pieces, and keep all that crosses a cut. Blocks are pieces enough.
        # Of each shape there is a graph for each kind of block, and for those of other models in this process.
        with (
            torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=_MAX_GRAPHS),
            torch._functorch.config.patch(ban_recompute_materialized_backward=_KEEP_WHAT_PRODUCTS_READ),
        ):
            result = self._compiled(*arguments)
        return result


def _with_room(cu_seqlens: Tensor | Sequence[int]) -> Tensor:
    """The packed documents, on the host, with empty ones behind them up to a power of two: few numbers, few graphs."""
    return _padded(wholes("cu_seqlens", cu_seqlens))


@lru_cache(maxsize=8)
def _padded(bounds: tuple[int, ...]) -> Tensor:
    """Every block of a step asks the same, hence the cache."""
    room = 1 << (len(bounds) - 2).bit_length()
    return torch.tensor([*bounds, *bounds[-1:] * (room + 1 - len(bounds))])
