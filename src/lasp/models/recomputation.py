"""Other ways to run the blocks of a model in training: recomputed in the backward pass, in pieces, compiled.

They replace the `forward` of single modules, so that parameter names, hooks and everything else stay as they are.
Without gradients the blocks run as before.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lasp.exchange.start import keeping_exchanges
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
    """The shapes that the blocks of one model are compiled for, where a graph is for one shape alone: the first eight.
    Each takes the compiler seconds."""

    def __init__(self) -> None:
        self._known: set[Any] = set()
        self._is_full = False

    def admit(self, x: Tensor, sp: Any) -> bool:
        """True if a block's input is to run compiled.

        All ranks of `sp` find the same: their shapes change together.
        """
        shape = (x.shape, None if sp is None else sp.key)
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
    """Compile the block's training forward, the exchange inside it.

    Where all that looks at other tokens are operators (`Mixer.has_operators`) a block is one graph: over ranks, for any
    documents, and for any number of tokens, the first number that comes having a graph of its own.

    Elsewhere a graph is for one shape, and those that `shapes` does not admit run uncompiled, after a warning; so do
    packed documents. It breaks around the scan of a delta rule, over ranks around short convolutions and softmax
    attention too, and with PyTorch before 2.13 around every recurrence (lasp.ops.scan): what comes before and after is
    compiled.

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
        self._is_compiled_whole = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_block": self._block, "_shapes": self._shapes, "_compiled": None, "_is_compiled_whole": False}

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
        whole = all(mixer.has_operators(x.device, x.dtype) for mixer in self._mixers)
        takes = state is None and not output_state and torch.is_grad_enabled()
        if not takes or not (whole or (cu_seqlens is None and self._shapes.admit(x, sp))):
            result: tuple[Tensor, Any] = run(x, start, state, output_state, cu_seqlens, sp)
            return result
        if self._compiled is None or whole != self._is_compiled_whole:
            self._is_compiled_whole = whole
            ways: dict[str, Any] = {"fullgraph": True} if whole else {
                "fullgraph": TRACEABLE and self._is_bare, "dynamic": False
            }  # fmt: skip
            self._compiled = torch.compile(run, **ways)
        if cu_seqlens is not None:
            cu_seqlens = _of_any_number(wholes("cu_seqlens", cu_seqlens))
        # Under DDP the compiler would cut a block's graph at every 25 MB of weights, to sum gradients between the
        # pieces, and keep all that crosses a cut. Blocks are pieces enough.
        # Of each shape there is a graph for each kind of block, and for those of other models in this process.
        with (
            torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=_MAX_GRAPHS),
            torch._functorch.config.patch(ban_recompute_materialized_backward=_KEEP_WHAT_PRODUCTS_READ),
        ):
            result = self._compiled(x, start, state, output_state, cu_seqlens, sp)
        return result


@lru_cache(maxsize=8)
def _of_any_number(bounds: tuple[int, ...]) -> Tensor:
    """Packed documents as a graph takes them, on the host. Every block of a step asks the same, hence the cache."""
    documents = torch.tensor(bounds)
    torch._dynamo.maybe_mark_dynamic(documents, 0)
    return documents
