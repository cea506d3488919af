"""Other ways to run the blocks of a model in training: recomputed in the backward pass, in pieces, compiled.

They replace the `forward` of single modules, so that parameter names, hooks and everything else stay as they are.
Without gradients the blocks run as before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lasp.layers import ShortConvolution, SoftmaxAttention
from lasp.ops.scan import TRACEABLE
from lasp.sequence.kept import keeping_exchanges

RECOMPUTATIONS = ("none", "selective", "full")


def recompute(block: nn.Module, recomputation: str) -> None:
    """Keep of the block's forward pass only its input, and run it again in the backward pass.

    recomputation: "full", or "selective" to keep also what a recurrence's exchange brought, one state a head, so that
        running it again exchanges nothing. Halos, and keys and values of softmax layers, are exchanged again.
    """
    run = block.forward
    options: dict[str, Any] = {"context_fn": keeping_exchanges} if recomputation == "selective" else {}

    @wraps(run)
    def recomputed(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*arguments)
        # Nothing in a block is random.
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, **options)

    block.forward = recomputed  # type: ignore[method-assign]


def run_in_pieces(ffn: nn.Module, piece_tokens: int) -> None:
    """Run a channel mixer on `piece_tokens` tokens at a time, and again in the backward pass.

    Its hidden activations, several times as wide as the model, then exist for one piece only.
    """
    run: Callable[[Tensor], Tensor] = ffn.forward

    @wraps(run)
    def pieces(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return run(x)
        parts = x.split(piece_tokens, dim=1)
        return torch.cat(
            [checkpoint(run, part, use_reentrant=False, preserve_rng_state=False) for part in parts], dim=1
        )

    ffn.forward = pieces  # type: ignore[method-assign]


def compile_block(block: nn.Module) -> None:
    """Compile the block's training forward, the exchange inside it, without graph breaks.

    PyTorch before 2.13 cannot be let trace a recurrence without fused kernels (lasp.ops.scan): there the graph breaks
    around each, and what comes before and after it is compiled. Blocks with packed documents run uncompiled: their
    layout is another in every step.
    """
    run = block.forward
    compiled = torch.compile(run, fullgraph=TRACEABLE, dynamic=False)
    # Under DDP the compiler would cut a block's graph at every 25 MB of weights, to sum gradients between the pieces,
    # and keep all that crosses a cut. Blocks are pieces enough.
    whole = torch._dynamo.config.patch(optimize_ddp=False)

    @wraps(run)
    def chosen(x: Tensor, start: int, state: Any, output_state: bool, cu_seqlens: Any, sp: Any) -> tuple[Tensor, Any]:
        plain = state is None and not output_state and cu_seqlens is None and torch.is_grad_enabled()
        if not plain:
            result: tuple[Tensor, Any] = run(x, start, state, output_state, cu_seqlens, sp)
            return result
        with whole:
            result = compiled(x, start, state, output_state, cu_seqlens, sp)
        return result

    block.forward = chosen  # type: ignore[method-assign]


def check_compilable(model: nn.Module) -> None:
    """Raise ValueError where blocks exchange something that the compiler cannot follow."""
    for name, module in model.named_modules():
        if isinstance(module, (ShortConvolution, SoftmaxAttention)):
            raise ValueError(
                f"compile under sequence parallelism takes blocks whose only exchange is a recurrence's, and {name} is "
                f"a {type(module).__name__}, which has its own: leave one of the two out"
            )
