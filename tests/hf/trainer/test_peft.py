"""LoRA on a split model: the gradients of its matrices are those of the whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import world
from hf.small_models import build, measured, tokens
from hf.trainer.with_lora import lora
from tolerances import relative_error

import lasp
import lasp.hf
from lasp.distributed import ExchangeError


@pytest.mark.parametrize("first", ["lora", "parallelize"])
def test_lora(first: str) -> None:
    ids = tokens(2, 24)
    batch = {"input_ids": ids, "labels": ids}
    whole = measured(lora(build("qwen3_next")), batch)

    def work(rank: int) -> float:
        sp = lasp.SequenceParallel(dist.group.WORLD)
        if first == "lora":
            model = lasp.hf.parallelize(lora(build("qwen3_next")), sp)
        else:
            model = lora(lasp.hf.parallelize(build("qwen3_next"), sp))
        found = measured(model, lasp.hf.shard(batch, sp, (5, 19)))
        assert found.gradients.keys() == whole.gradients.keys() and all("lora" in name for name in found.gradients)
        return max(relative_error(sp.sum(g) / 2, whole.gradients[name]) for name, g in found.gradients.items())

    assert max(world.run(2, work)) < 1e-11


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_methods_that_add_tokens_are_refused(method: str) -> None:
    """Tries it on two ranks, of which each is told; LoRA, above, is the control."""
    import peft

    ids = tokens(2, 24)

    def work(rank: int) -> bool:
        sp = lasp.SequenceParallel(dist.group.WORLD)
        config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = lasp.hf.parallelize(peft.get_peft_model(build("mamba2", torch.float32), config), sp)
        with pytest.raises(ExchangeError, match="use LoRA"):
            model(**lasp.hf.shard({"input_ids": ids, "labels": ids}, sp))
        return True

    assert world.run(2, work) == [True, True]
