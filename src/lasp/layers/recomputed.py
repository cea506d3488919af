"""Parts of layers that run again in the backward pass, rather than keep what they make."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

R = TypeVar("R")


def recomputed(run: Callable[..., R], *arguments: Any) -> R:
    """run(*arguments), which keeps its arguments alone for the backward pass. Nothing in it may be random.

    A product of matrices at its end is not computed again: what that keeps, its input, is there before.
    """
    if not torch.is_grad_enabled():
        return run(*arguments)
    result: R = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def recomputed_around_scans(run: Callable[..., R], *arguments: Any) -> R:
    """Run as `recomputed` does, but keep what recurrences, products of matrices and other ranks give.

    For compiled graphs, where both are operators. What a recurrence reads is made again for its backward pass.
    """
    result: R = checkpoint(
        run,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _kept),
    )
    return result


def _kept(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    own, matrices = torch.ops.lasp, torch.ops.aten
    costly = {
        own.scan_forward.default, own.normed_projection.default, own.rows_before.default, matrices.mm.default,
        matrices.addmm.default,
    }  # fmt: skip
    return CheckpointPolicy.MUST_SAVE if operator in costly else CheckpointPolicy.PREFER_RECOMPUTE
