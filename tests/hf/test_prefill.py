"""A prompt over ranks, and transformers' own generate after it: logits and tokens are those of the whole prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import world
from hf.small_models import SMALL, build, exactly, tokens
from tolerances import relative_error

import lasp
import lasp.hf
from lasp.hf.library import CACHES, cache_argument

PROMPT, NEW = tokens(2, 37), 6
# A shard shorter than a convolution, also the last.
LAYOUTS = {2: ((20, 16), (34, 2)), 3: ((15, 1, 20), (30, 4, 2))}


def generated(model: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, NEW] and logits [B, NEW, vocab]."""
    found = model.generate(
        ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True,
        **options,
    )  # fmt: skip
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, 1)


def compare(kind: str, size: int) -> None:
    model = build(kind).eval()
    with exactly():
        before = model(PROMPT[:, :-1], use_cache=True)
        first, cache = before.logits[:, -1], next(before[name] for name in CACHES if before.get(name) is not None)
        options = {str(cache_argument(model)): cache, "attention_mask": torch.ones_like(PROMPT)}
        whole, expected = generated(model, PROMPT[:, -1:], **options)
        # transformers' MiniMax forgets its window where it goes on from a cache.
        if kind != "minimax":
            assert relative_error(generated(model, PROMPT)[1], expected) < 1e-11
        # The control: a rank that has seen its own tokens only.
        parted = generated(model, PROMPT[:, 20:])[1]
    assert relative_error(parted, expected) > 1e-3

    def work(rank: int) -> list[tuple[float, float, bool]]:
        found = []
        for lengths in LAYOUTS[size]:
            sp = lasp.SequenceParallel(dist.group.WORLD, lengths=lengths)
            model = lasp.hf.parallelize(build(kind).eval(), sp)
            with exactly():
                filled = lasp.hf.prefill(model, PROMPT[:, :-1], sp)
                options = {"attention_mask": torch.ones_like(PROMPT), **filled.keywords}
                words, after = generated(model, PROMPT[:, -1:], **options)
            found.append(
                (relative_error(filled.logits, first), relative_error(after, expected), bool((words == whole).all()))
            )
        return found

    for found in world.run(size, work):
        assert all(before < 1e-11 and after < 1e-11 and same for before, after, same in found), found


@pytest.mark.ci
def test_a_prompt_over_ranks() -> None:
    compare("qwen3_next", 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", SMALL)
def test_a_prompt_of_every_type(kind: str, size: int) -> None:
    compare(kind, size)


def test_what_cannot_be_filled_is_refused() -> None:
    model = build("mamba2").eval()
    with pytest.raises(ValueError, match="parallelize"):
        lasp.hf.prefill(model, PROMPT, None)
    lasp.hf.parallelize(model, None)
    with pytest.raises(ValueError, match=r"lasp\.hf\.prefill fills one"), torch.no_grad():
        model(**lasp.hf.shard({"input_ids": PROMPT}, None), use_cache=True)
