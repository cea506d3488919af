"""Models of transformers, split over ranks: loss, logits and all gradients are those of their own code, unsplit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import world
from hf.small_models import SMALL, Measured, build, exactly, measured, tokens
from tolerances import relative_error

import lasp
import lasp.hf

T = 61
# Shards of one token, shorter than a convolution, and as equal as can be.
LAYOUTS: dict[int, tuple[tuple[int, ...], ...]] = {2: ((31, 30),), 3: ((20, 20, 21), (25, 2, 34), (40, 1, 20))}
IN_SHORT = {"qwen3_next", "mamba2", "nemotron_h"}
KINDS = [pytest.param(kind, marks=() if kind in IN_SHORT else pytest.mark.exhaustive) for kind in SMALL]
BOUND = 1e-11


def errors(found: Measured, whole: Measured, part: Any, sp: Any) -> dict[str, float]:
    """Relative errors of a rank's results. Gradients: the mean over ranks is that of the whole."""
    start = sum(part["lasp_shard"].lengths[: part["lasp_shard"].rank])
    logits = whole.logits[:, start : start + found.logits.shape[1]]
    size = 1 if sp is None else sp.size
    assert size > 1 or found.gradients.keys() == whole.gradients.keys()
    zero = {name: torch.zeros_like(gradient) for name, gradient in whole.gradients.items()}
    gradients = {
        name: gradient if sp is None else sp.sum(gradient) for name, gradient in (zero | found.gradients).items()
    }
    worst = max(relative_error(gradients[name] / size, whole.gradients[name]) for name in whole.gradients)
    return {
        "loss": relative_error(found.loss, whole.loss),
        "logits": relative_error(found.logits, logits),
        "gradients": worst,
    }


def over_ranks(
    model: Any, batch: dict[str, Any], whole: Measured, size: int, layouts: Sequence[Any], **options: Any
) -> dict[str, float]:
    """The largest errors of a model that so many ranks split, over all layouts and ranks."""

    def work(rank: int) -> list[dict[str, float]]:
        sp = lasp.SequenceParallel(dist.group.WORLD)
        lasp.hf.parallelize(model, sp, **options)
        found = []
        for lengths in layouts:
            part = lasp.hf.shard(batch, sp, lengths)
            found.append(errors(measured(model, part), whole, part, sp))
        return found

    found = [one for rank in world.run(size, work) for one in rank]
    return {name: max(one[name] for one in found) for name in found[0]}


def alone(model: Any, batch: dict[str, Any], whole: Measured, lengths: tuple[int, ...]) -> float:
    """The control: how far logits are off where a rank computes its tokens by itself, here the last."""
    start = sum(lengths[:-1])
    part = {"input_ids": batch["input_ids"][:, start:], "position_ids": torch.arange(start, sum(lengths))[None]}
    with exactly(), torch.no_grad():
        logits = model(**part, use_cache=False).logits
    return relative_error(logits, whole.logits[:, start:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_model_is_the_same_model(kind: str) -> None:
    model = build(kind)
    ids = tokens(2, T)
    batch = {"input_ids": ids, "labels": ids.masked_fill(tokens(2, T, seed=2) < 20, -100)}
    whole = measured(model, batch)
    for size, layouts in LAYOUTS.items():
        for method in ("auto",) if size == 3 else ("auto", "all_gather"):
            found = over_ranks(model, batch, whole, size, layouts, softmax_method=method)
            assert max(found.values()) < BOUND, (size, method, found)
    assert alone(model, batch, whole, LAYOUTS[3][0]) > 1e-3
    # By one process, with this library's operators.
    part = lasp.hf.shard(batch, None)
    found = errors(measured(lasp.hf.parallelize(model, None), part), whole, part, None)
    assert max(found.values()) < BOUND, found
